"""A zip file of the chosen model to hand on: the model, its results, the configuration, a program that asks it, and a README.

The same content gives the same bytes, and is not packed again. The program needs nothing but the runtime: ONNX Runtime GenAI for an
ONNX model, with the prompt already in the model's own template; phinetune for the others.
"""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

from phinetune import __version__
from phinetune.artifact import content_key, disk_errors, file_hash, read_manifest
from phinetune.data.messages import fill_template, parse_data_config, template_fields
from phinetune.errors import PhinetuneError
from phinetune.events import Note, OnEvent
from phinetune.model.contract import PromptContract, load_contract
from phinetune.workflow.config import PackageConfig

_EARLIEST = (1980, 1, 1, 0, 0, 0)  # the first moment that a zip file can name
_LARGE = 1 << 31
_PACKED = (".json", ".txt", ".py", ".jinja", ".model", ".md")
_ANSWER_TOKENS = 256
_ANY = "{message}"


def pack(config: PackageConfig, output: Path, files: tuple[str, ...], on_event: OnEvent) -> None:
    """Write `output`/NAME.zip from `output`/model and `files` beside it; a file of that name that is no package of ours stays as it is."""
    target = output / f"{Path(config.name).name.removesuffix('.zip')}.zip"
    model = output / "model"
    members = {str(f.relative_to(output).as_posix()): f for f in sorted(model.rglob("*")) if f.is_file()}
    members |= {name: output / name for name in files}
    key = content_key(1, __version__, config.sample_code, {name: file_hash(f) for name, f in members.items()})
    comment = f"phinetune {key}".encode()
    there = _comment(target)
    if there == comment:
        on_event(Note(f"unchanged: {target}"))
        return
    if target.exists() and not there.startswith(b"phinetune "):
        on_event(
            Note(f"{target}: was not written by phinetune and stays as it is; name the package otherwise", warning=True)
        )
        return
    texts = _texts(model, config.sample_code)
    if config.sample_code and "sample.py" not in texts:
        on_event(Note(f"{target.name}: no sample.py, the model does not answer prompts by itself"))
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with disk_errors(output), zipfile.ZipFile(temporary, "w") as archive:
            archive.comment = comment
            for name, text in sorted(texts.items()):
                archive.writestr(_entry(name), text)
            for name, file in sorted(members.items()):
                with (
                    file.open("rb") as source,
                    archive.open(_entry(name), "w", force_zip64=file.stat().st_size >= _LARGE) as sink,
                ):
                    shutil.copyfileobj(source, sink, 1 << 20)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    on_event(Note(f"package: {target}, {target.stat().st_size / 1e6:.1f} MB"))


def _texts(model: Path, sample: bool) -> dict[str, str]:
    """The README, and the program if there is to be one and the model can answer."""
    code = sample_code(model) if sample else None
    return {"README.txt": _readme(model, code), **({"sample.py": code} if code else {})}


def _entry(name: str) -> zipfile.ZipInfo:
    """A member without the time and the permissions of its file; texts are compressed, weights hardly would be."""
    info = zipfile.ZipInfo(name, _EARLIEST)
    info.external_attr = 0o644 << 16
    info.create_system = 3
    info.compress_type = zipfile.ZIP_DEFLATED if name.endswith(_PACKED) else zipfile.ZIP_STORED
    return info


def _comment(file: Path) -> bytes:
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.comment
    except (OSError, zipfile.BadZipFile):
        return b""


def sample_code(model: Path) -> str | None:
    """A program that loads `model`, in the folder beside it, and answers a prompt as in the training. None if it cannot answer."""
    manifest = read_manifest(model)
    trained = manifest.get("data") if isinstance(manifest.get("data"), dict) else {}
    template, chat = _trained_prompt(trained or {})
    fields = list(dict.fromkeys(template_fields(template, "prompt")))
    head = f"# {_usage(fields)}: the model's answer\n"
    system = (trained or {}).get("system")
    if manifest.get("kind") != "onnx":
        asked = f"{{'role': 'system', 'content': {system!r}}}, " if system else ""
        asked = f"[{asked}{{'role': 'user', 'content': prompt}}]"
        ids = f"prompt_ids({asked})" if chat else "raw_ids(prompt)"
        return head + _PHINETUNE.format(fields=fields, prompt=template, ids=ids, tokens=_ANSWER_TOKENS)
    built = manifest.get("export") or {}
    if built.get("exclude_embeds") or built.get("exclude_lm_head") or not (model / "genai_config.json").is_file():
        return None
    contract = load_contract(model)
    text = _rendered(contract, template, fields, system) if chat else _braces(_begin(contract)) + template
    adapters = [f.name for f in sorted(model.glob("*.onnx_adapter"))]
    load = _LOAD_ADAPTER.format(file=adapters[0]) if adapters else ""
    use = '\ngenerator.set_active_adapter(adapters, "adapter")' if adapters else ""
    return head + _ONNX.format(
        fields=fields, prompt=text, tokens=_ANSWER_TOKENS, longest=contract.max_length, load=load, use=use
    )


def _usage(fields: list[str]) -> str:
    words = ["".join(c if c.isalnum() else "_" for c in field).upper() for field in fields]
    return " ".join(["python sample.py", *words])


def _trained_prompt(trained: dict[str, Any]) -> tuple[str, bool]:
    """(column template of the prompt, whether it goes through the chat template) of the training; any message where there was none."""
    try:
        config = parse_data_config(trained)
    except PhinetuneError:  # a model that was never trained here
        return _ANY, True
    return (config.templates[0] if config.templates else _ANY), config.chat


def _rendered(contract: PromptContract, template: str, fields: list[str], system: str | None) -> str:
    """The column template within the model's chat template, as one template."""
    marks = {field: f"zqx{i}xqz" for i, field in enumerate(fields)}
    messages = [{"role": "system", "content": system}] if system else []
    content = fill_template(template, marks)
    text = _braces(contract.render([*messages, {"role": "user", "content": content}], add_generation_prompt=True))
    for field, mark in marks.items():
        text = text.replace(mark, f"{{{field}}}")
    return text


def _begin(contract: PromptContract) -> str:
    """What the tokenizer puts before a text without a template: its BOS, or nothing."""
    first: list[int] = contract.tokenizer("x")["input_ids"][:1]
    return str(contract.tokenizer.bos_token) if first == [contract.bos_token_id] else ""


def _braces(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _readme(model: Path, code: str | None) -> str:
    """What is in the package and how to begin. Nothing in it depends on the machine."""
    manifest = read_manifest(model)
    kind, found = str(manifest.get("kind")), manifest.get("versions") or {}
    libraries = ("onnxruntime-genai",) if kind == "onnx" else ("phinetune", "torch", "transformers")
    lines = ["Contents", "", f"  model/          {_KINDS.get(kind, 'a model')}; its manifest.json says how it was made"]
    lines += ["  results.json    what was tried, and what was measured"]
    lines += ["  workflow.json   the configuration of the run, for: phinetune run workflow.json"]
    lines += ["  sample.py       asks the model one prompt"] if code else []
    if kind == "adapter":
        lines += ["", f"The adapter needs its base model, {manifest.get('base_model')}, which is not in this package."]
    pins = " ".join(f"{name}=={found[name].partition('+')[0]}" for name in libraries if name in found)
    if pins:
        lines += ["", "Made and checked with these versions:", "", f"  pip install {pins}"]
    if code:
        lines += [
            "",
            "Then:",
            "",
            code.splitlines()[0].removeprefix("#").partition(":")[0].rstrip().replace(" python", "  python"),
        ]
    return "\n".join(lines) + "\n"


_KINDS = {
    "onnx": "an ONNX Runtime GenAI model",
    "adapter": "a LoRA adapter in PEFT's format",
    "hf": "a transformers model",
}
_ASK = """\
PROMPT = {prompt!r}
FIELDS = {fields!r}

if len(sys.argv) != len(FIELDS) + 1:
    sys.exit("give " + ", ".join(FIELDS))
prompt = PROMPT.format(**dict(zip(FIELDS, sys.argv[1:])))
"""

_PHINETUNE = (
    """\
import sys
from pathlib import Path

import phinetune

"""
    + _ASK
    + """\
generator = phinetune.load_generator(str(Path(__file__).parent / "model"))
ids = generator.contract.{ids}
for answer in generator.complete([ids], {tokens}):
    print(answer.text.strip())
"""
)

_LOAD_ADAPTER = """
adapters = og.Adapters(model)
adapters.load(str(folder / {file!r}), "adapter")"""

_ONNX = (
    """\
import sys
from pathlib import Path

import onnxruntime_genai as og

"""
    + _ASK
    + """\
folder = Path(__file__).parent / "model"
model = og.Model(str(folder))
tokenizer = og.Tokenizer(model){load}
ids = tokenizer.encode(prompt)
params = og.GeneratorParams(model)
params.set_search_options(max_length=min(len(ids) + {tokens}, {longest}), do_sample=False)
generator = og.Generator(model, params){use}
generator.append_tokens(ids)
stream = tokenizer.create_stream()
while not generator.is_done():
    generator.generate_next_token()
    print(stream.decode(int(generator.get_next_tokens()[0])), end="", flush=True)
print()
"""
)
