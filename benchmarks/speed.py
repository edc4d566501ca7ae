"""Answers of the shipped int4 folder beside llama.cpp and onnxruntime-genai's own build: prefill and decode, in turn, on one machine.

    python benchmarks/speed.py [--model smollm2-135m] [--rounds 7] [--prompt 512] [--answer 64] [--threads N] [--work FOLDER]

    phinetune              the folder that `phinetune export` writes, loaded as `phinetune chat` loads it
    phinetune, tuned       the same with export_config.tune: the block size that is fastest here
    onnxruntime-genai      its builder's default int4 model, loaded with nothing said
    llama.cpp              the same weights at Q4_1 in every product, quantized by llama.cpp itself (needs llama-cpp-python and gguf)

Every engine is given the same token ids of a real text, greedy, on the same number of threads but for the third, which is left alone; each
round starts a fresh process for each, in another order; within it the median of three answers counts. Prefill: the ids of the prompt
over the seconds to the first token. Decode: tokens after the first over their seconds, the same number for all whatever they are. That
llama.cpp computes the same model is checked: with float16 weights its next token after the prompt is torch's. Medians of rounds
and of the ratios within rounds go to benchmarks/results/speed.json. Only Llama architectures are written as GGUF here.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from gguf_file import quantize_gguf, write_gguf
from train import about

RESULTS = Path(__file__).with_name("results") / "speed.json"
LLAMA = "llama.cpp"
OURS = "phinetune"
_REPEATS = 3
Engine = Callable[[list[int], int], tuple[float, float, list[int]]]
"""(ids of a prompt, tokens to answer) -> (seconds to the first token, seconds of the others, tokens)."""


def genai(model: Any) -> Engine:
    """An `onnxruntime_genai.Model` that answers."""
    import numpy as np
    import onnxruntime_genai as og

    def answer(ids: list[int], tokens: int) -> tuple[float, float, list[int]]:
        params = og.GeneratorParams(model)
        length = len(ids) + tokens
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, params)
        start = time.perf_counter()
        generator.append_tokens(np.array(ids, dtype=np.int32))
        generator.generate_next_token()
        found, first = [int(generator.get_next_tokens()[0])], time.perf_counter()
        for _ in range(tokens - 1):
            generator.generate_next_token()
            found.append(int(generator.get_next_tokens()[0]))
        return first - start, time.perf_counter() - first, found

    return answer


def llama_cpp_engine(file: str, threads: int, context: int) -> Engine:
    """A GGUF file in llama.cpp, through its own C interface; flash attention as it chooses by itself."""
    import llama_cpp
    import numpy as np

    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = -(-context // 256) * 256, 512, 512  # in blocks of its own
    options.n_threads = options.n_threads_batch = threads
    state = llama_cpp.llama_init_from_model(model, options)
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def following(ids: list[int]) -> int:
        tokens = (llama_cpp.llama_token * len(ids))(*ids)  # the batch points into it
        if llama_cpp.llama_decode(state, llama_cpp.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama.cpp could not decode")
        return int(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(state, -1), shape=(size,)).argmax())

    def answer(ids: list[int], tokens: int) -> tuple[float, float, list[int]]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(state), True)
        start = time.perf_counter()
        found, first = [following(ids)], time.perf_counter()
        for _ in range(tokens - 1):
            found.append(following([found[-1]]))
        return first - start, time.perf_counter() - first, found

    answer.kept = quiet  # type: ignore[attr-defined]
    return answer


def work(asked: dict[str, Any]) -> dict[str, Any]:
    """One engine's process: load, warm up, answer, and say how long it took."""
    ids, tokens = asked["ids"], asked["tokens"]
    if asked["engine"] == LLAMA:
        answer = llama_cpp_engine(asked["path"], asked["threads"], len(ids) + tokens + 8)
    elif asked["engine"].startswith(OURS):
        from phinetune.generation.onnx_backend import open_folder

        answer = genai(open_folder(Path(asked["path"]), asked["threads"]))
    else:
        import onnxruntime_genai as og

        answer = genai(og.Model(asked["path"]))
    answer(ids, 4)
    times = [answer(ids, tokens) for _ in range(_REPEATS)]
    return {
        "prefill": len(ids) / statistics.median(t[0] for t in times),
        "decode": (tokens - 1) / statistics.median(t[1] for t in times),
        "first": times[0][2][0],
    }


def ask(engine: str, path: Path, ids: list[int], tokens: int, threads: int) -> dict[str, Any]:
    """The figures of one engine from a fresh process. Exits with what it said if it died."""
    asked = json.dumps({"engine": engine, "path": str(path), "ids": ids, "tokens": tokens, "threads": threads})
    ran = subprocess.run([sys.executable, __file__, "--worker"], input=asked, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"{engine}: exit code {ran.returncode}\n{ran.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def prompt_of(source: Path, length: int) -> list[int]:
    """The first `length` token ids of this project's README."""
    from transformers import AutoTokenizer

    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    ids: list[int] = AutoTokenizer.from_pretrained(str(source), local_files_only=True)(text)["input_ids"]
    if len(ids) < length:
        raise SystemExit(f"--prompt: the text has {len(ids)} tokens")
    return ids[:length]


def quiet(event: Any) -> None:
    """Listens to nothing."""


def make(source: Path, folder: Path, ids: list[int], threads: int) -> dict[str, Path]:
    """Engine -> what it loads."""
    import phinetune

    made = {
        OURS: phinetune.export(str(source), folder / "onnx", {"max_drop": "any"}, on_event=quiet).folder,
        "onnxruntime-genai": phinetune.export(
            str(source), folder / "genai", {"algorithm": "default", "max_drop": "any"}, on_event=quiet
        ).folder,
        f"{OURS}, tuned": phinetune.export(
            str(source), folder / "tuned", {"max_drop": "any", "tune": True}, on_event=quiet
        ).folder,
    }
    if importlib.util.find_spec("llama_cpp") is None or importlib.util.find_spec("gguf") is None:
        print("without llama.cpp, which is not installed: pip install llama-cpp-python gguf", flush=True)
        return made
    plain, small = folder / "f16.gguf", folder / "q4_1.gguf"
    if not small.exists():
        write_gguf(source, plain)
        check_same_model(source, plain, ids, threads)
        quantize_gguf(plain, small, "Q4_1", threads)
    return {**made, LLAMA: small}


def check_same_model(source: Path, file: Path, ids: list[int], threads: int) -> None:
    """Exits if llama.cpp, on float16 weights, does not go on as torch does."""
    import torch

    from phinetune.model.load import LoadPlan, load_model

    model = load_model(source, LoadPlan(torch.float32, torch.device("cpu")))
    with torch.inference_mode():
        expected = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    found = ask(LLAMA, file, ids, 2, threads)["first"]
    if found != expected:
        raise SystemExit(f"llama.cpp goes on with token {found}, torch with {expected}: not the same model")


def summary(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Medians of each engine, and of phinetune's ratios to the others within rounds."""
    names = list(rounds[0])
    kinds = ("prefill", "decode")
    engines = {n: {k: round(statistics.median(r[n][k] for r in rounds), 1) for k in kinds} for n in names}
    ratios = {
        ours: {
            n: {k: round(statistics.median(r[ours][k] / r[n][k] for r in rounds), 2) for k in kinds}
            for n in names
            if not n.startswith(OURS)
        }
        for ours in names
        if ours.startswith(OURS)
    }
    return {"engines": engines, "ratios": ratios, "rounds": rounds}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="smollm2-135m", help="a merged or base model")
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--prompt", type=int, default=512, help="tokens")
    options.add_argument("--answer", type=int, default=64, help="tokens")
    options.add_argument("--threads", type=int, default=0, help="of all engines (default: as many as phinetune takes)")
    options.add_argument("--work", type=Path, help="where models are kept (default: a temporary folder)")
    options.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    a = options.parse_args()
    if a.worker:
        print(json.dumps(work(json.load(sys.stdin))))
        return
    from phinetune.model.compute import usable_cpus
    from phinetune.model.folder import resolve_model

    source, threads = resolve_model(a.model, on_event=quiet), a.threads or usable_cpus()
    ids = prompt_of(source, a.prompt)
    with tempfile.TemporaryDirectory(prefix="phinetune-bench-") as scratch:
        paths, rounds = make(source, a.work or Path(scratch), ids, threads), []
        for number in range(a.rounds):
            order = list(paths)[number % len(paths) :] + list(paths)[: number % len(paths)]
            found = {name: ask(name, paths[name], ids, a.answer, threads) for name in order}
            rounds.append({name: found[name] for name in paths})
            print(
                f"round {number + 1}: "
                + "; ".join(f"{n} {f['prefill']:.0f}, {f['decode']:.0f}" for n, f in found.items()),
                flush=True,
            )
    result = summary(rounds)
    engines = ("llama-cpp-python", "onnxruntime-genai", "onnxruntime")
    versions = {d.name: d.version for d in metadata.distributions() if d.name in engines}
    setting = {"model": a.model, "prompt": a.prompt, "answer": a.answer, "threads": threads}
    RESULTS.write_text(
        json.dumps({**setting, **result, **about(), "engines_versions": versions}, indent=2) + "\n", encoding="utf-8"
    )
    for name, figures in result["engines"].items():
        print(f"{name:<22} prefill {figures['prefill']:7.1f} tokens/s, decode {figures['decode']:6.1f} tokens/s")
    for ours, others in result["ratios"].items():
        for name, ratio in others.items():
            print(f"{ours} against {name}: prefill {ratio['prefill']:.2f} x, decode {ratio['decode']:.2f} x")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
