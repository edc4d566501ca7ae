"""The prompt contract: how text reaches one model, fixed once and carried along to every later stage.

A chat template, the special ids, the ids that end an answer, and probes: a few texts with the token ids they had when the model was
trained. The contract is saved with the adapter, the merged folder and the ONNX folder, and each of them is checked against it, so a
model cannot be trained with one prompt and run with another. Not here: which messages are learned (`data/examples.py`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from phinetune.artifact import write_json
from phinetune.errors import ConfigError, ModelError, first_line

CONTRACT_FILE = "prompt_contract.json"

# For models without a chat template: contents one after the other, the answer closed by EOS.
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"

_PROBE_MESSAGES: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "What is the tone of this phrase? I can't believe it's already Monday!"),),
    (("user", "Hello."), ("assistant", "Hello! How can I help?"), ("user", "  Two  spaces,\ta tab\nand a line.  ")),
    (("user", "ما هي نبرة هذه العبارة؟ لقد نسيت مفاتيحي مرة أخرى."),),
    (("user", "Je suis ravi de vous revoir, où étiez-vous passé cet été ?"),),
    (("user", "Bugün hava çok güzel, değil mi? İyi günler!"),),
    (("user", "Habari za asubuhi, ndugu yangu. Umelala vizuri?"),),
    (("user", "def f(x):\n    return x ** 2  # 你好, 🙂 3.14159"),),
)


@dataclass(frozen=True)
class Probe:
    """A rendered prompt and the ids it had when the contract was made."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class PromptContract:
    """See the module's head. Texts in, ids out; ids in, text out. `stop_ids` end an answer, the first is the one that training teaches."""

    tokenizer: Any
    chat_template: str
    bos_token_id: int | None
    pad_token_id: int
    stop_ids: tuple[int, ...]
    max_length: int
    probes: tuple[Probe, ...] = ()

    def render(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool) -> str:
        """The text of a conversation in the model's own template; with `add_generation_prompt` it ends where the answer begins."""
        import jinja2

        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                enable_thinking=False,  # templates that can open a thinking block leave it empty; the others do not know the name
            )
        except jinja2.TemplateError as error:
            roles = ", ".join(m["role"] for m in messages)
            raise ModelError(
                f"the model's chat template refuses a conversation of {roles}: {error}",
                "use the roles that the template knows",
            ) from None
        return text

    def tokenize(self, text: str) -> list[int]:
        """Ids of a rendered text. No special token is added: the template has written them."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def raw_ids(self, text: str) -> list[int]:
        """Ids of a text without a template, begun as the tokenizer begins every text by itself: with BOS, or with nothing."""
        ids = self.tokenize(text)
        begin = [self.bos_token_id] if self.bos_token_id is not None and _adds_bos(self.tokenizer) else []
        return ids if ids[:1] == begin else [*begin, *ids]

    def with_chat_template(self, template: str | None) -> PromptContract:
        """This contract with another template, its turn end first among the stop ids; itself for None or the same one.

        Raises ConfigError if `template` is not Jinja, fails on a plain conversation, or leaves its messages out.
        """
        if template is None or template == self.chat_template:
            return self
        bare = replace(self, chat_template=template, probes=())
        try:
            shown = bare.render([{"role": "user", "content": "qwx"}, {"role": "assistant", "content": "yes"}], False)
            found = replace(bare, stop_ids=tuple(dict.fromkeys([*_turn_end(bare), *self.stop_ids])))
            made = replace(found, probes=_probes(found))
        except Exception as error:  # a template can fail in any way that Python can
            cause = error.__cause__ or error.__context__ or error
            raise ConfigError(
                f"data.chat_template: fails on a plain conversation: {_first_line(cause)}",
                "give a Jinja template over messages, add_generation_prompt, bos_token and eos_token",
            ) from error
        if "qwx" not in shown or "yes" not in shown:
            raise ConfigError("data.chat_template: leaves out what the messages say", "write message['content']")
        return made

    def prompt_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Ids of the prompt whose answer comes next."""
        return self.tokenize(self.render(messages, add_generation_prompt=True))

    def decode(self, ids: Sequence[int]) -> str:
        """The answer's text: special tokens left out."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def as_dict(self) -> dict[str, Any]:
        """What is saved; the tokenizer has files of its own."""
        return {
            "chat_template": self.chat_template,
            "generation_prompt": self._generation_prompt(),
            "bos_token_id": self.bos_token_id,
            "pad_token_id": self.pad_token_id,
            "stop_ids": list(self.stop_ids),
            "max_length": self.max_length,
            "probes": [{"text": p.text, "ids": list(p.ids)} for p in self.probes],
        }

    def _generation_prompt(self) -> str:
        """What the template writes to begin an answer: where the ids with it part from those without it."""
        messages = [{"role": "user", "content": "x"}]
        without, ids = (self.tokenize(self.render(messages, add_generation_prompt=g)) for g in (False, True))
        start = next(
            (i for i, (a, b) in enumerate(zip(ids, without, strict=False)) if a != b), min(len(ids), len(without))
        )
        text: str = self.tokenizer.decode(ids[start:], skip_special_tokens=False)
        return text

    def save(self, folder: Path) -> None:
        """Write the contract and the tokenizer's files into `folder`."""
        self.tokenizer.chat_template = self.chat_template
        self.tokenizer.save_pretrained(str(folder))
        write_json(folder / CONTRACT_FILE, self.as_dict())


def make_contract(tokenizer: Any, config: Any, generation_config: Any = None) -> PromptContract:
    """The contract of a base model, from its tokenizer, config and generation config. Raises ModelError if no token can end an answer."""
    template = tokenizer.chat_template or ("{{ bos_token }}" if _adds_bos(tokenizer) else "") + PLAIN_TEMPLATE
    if isinstance(template, dict):
        template = template.get("default") or next(iter(template.values()))
    named = [
        _ids(tokenizer.eos_token_id),
        _ids(getattr(generation_config, "eos_token_id", None)),
        _ids(getattr(config, "eos_token_id", None)),
    ]
    bare = PromptContract(tokenizer, template, tokenizer.bos_token_id, 0, (), 0)
    stop_ids = tuple(dict.fromkeys([*_turn_end(bare), *(i for ids in named for i in ids)]))
    if not stop_ids:
        raise ModelError(
            "the tokenizer has no token that ends an answer (EOS)", "set eos_token in its tokenizer_config.json"
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[-1]
    context = getattr(config, "max_position_embeddings", None) or 1 << 20
    contract = PromptContract(tokenizer, template, tokenizer.bos_token_id, int(pad), stop_ids, int(context))
    return PromptContract(**{**vars(contract), "probes": _probes(contract)})


def _adds_bos(tokenizer: Any) -> bool:
    """True if the tokenizer begins every text with BOS by itself."""
    return tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]


def _ids(value: Any) -> list[int]:
    return [] if value is None else [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]


def _turn_end(contract: PromptContract) -> list[int]:
    """The special token that the template writes after an answer, if it writes one."""
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "yes"}]
    text = contract.render(messages, add_generation_prompt=False)
    tail = contract.tokenize(text[text.rindex("yes") + len("yes") :]) if "yes" in text else []
    special = contract.tokenizer.added_tokens_decoder
    return [tail[0]] if tail and tail[0] in special else []


def _probes(contract: PromptContract) -> tuple[Probe, ...]:
    texts = [
        contract.render([{"role": r, "content": c} for r, c in messages], add_generation_prompt=True)
        for messages in _PROBE_MESSAGES
    ]
    return tuple(Probe(text, tuple(contract.tokenize(text))) for text in texts)


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a local folder. Raises ModelError if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ModelError(
            f"{folder}: the tokenizer cannot be loaded: {_first_line(error)}",
            "the folder needs tokenizer.json and tokenizer_config.json",
        ) from error


def _first_line(error: BaseException) -> str:
    return first_line(error)


def load_contract(folder: Path, trust_remote_code: bool = False) -> PromptContract:
    """The contract saved in `folder`. Raises ModelError if it is missing, or if the tokenizer beside it now gives other ids."""
    file = folder / CONTRACT_FILE
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        probes = tuple(Probe(p["text"], tuple(p["ids"])) for p in saved["probes"])
        contract = PromptContract(
            load_tokenizer(folder, trust_remote_code),
            saved["chat_template"],
            saved["bos_token_id"],
            saved["pad_token_id"],
            tuple(saved["stop_ids"]),
            saved["max_length"],
            probes,
        )
    except FileNotFoundError:
        raise ModelError(
            f"{file}: no such file", "the folder was not written by phinetune, or not completely"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file}: not a prompt contract: {_first_line(error)}") from None
    for probe in probes:
        if tuple(contract.tokenize(probe.text)) != probe.ids:
            raise ModelError(
                f"{folder}: its tokenizer gives other token ids than when the model was trained, for {probe.text[:40]!r}",
                "restore the tokenizer's files",
            )
    return contract
