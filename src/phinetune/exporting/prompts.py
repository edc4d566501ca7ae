"""From messages to token ids inside the exported folder: does ONNX Runtime make the prompts that the model was trained on?

Its tokenizer is asked for the ids of the contract's probes, of the training's prompts and of `TEXTS`, put into the model's own template;
its chat template engine for the text of a few conversations. Any difference is a problem, told by the first text that shows it. What the
installed runtime cannot do is said. Not here: the graph.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phinetune.errors import first_line
from phinetune.generation.onnx_backend import onnx_runtime
from phinetune.model.contract import Probe, PromptContract

TEXTS = (
    "Plain words, 3.14159 and 1,000,000; an e-mail@example.org (brackets) [and] {braces}!?",
    "It's what we'll say, THEY'RE sure I don't; O'Neill's",
    "  two  spaces   three\ttab\t\ttabs\nline\n\nempty line\r\nanother end \n indented\n    code()\n  ",
    "ما هي نبرة هذه العبارة؟ لَقَدْ نَسِيتُ مَفاتيحي، ١٢٣٤٥.",
    "Habari za asubuhi, ndugu yangu; ng'ombe wangu hawajambo?",
    "İstanbul'da ılık bir gün, şöyle böyle; çığ gibi ağaçlar. IĞDIR iğde",
    "Où étiez-vous passé cet été ? « Ça va », répondit-il — l’œuvre naïve de Noël.",
    "Cafe\u0301 nai\u0308ve A\u030angstro\u0308m beside Café naïve Ångström; ﬁn ﬀ ½ № ™ Ⅷ",
    "你好，世界！这是一个测试。日本語のテスト：ひらがな、カタカナ、漢字。한국어 시험입니다.",
    "नमस्ते दुनिया, यह एक परीक्षण है। क्षत्रिय ज्ञान १२३",
    "สวัสดีชาวโลก; שלום עולם; Привет, мир! Ελληνικά; Tiếng Việt được; አማርኛ",
    "🙂 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇹🇷🇫🇷 ❤️",
    "no\u00a0break\u2009thin\u3000wide\u200bzero\u200djoined \ufeffmark",
    "x = [i**2 for i in range(10)]  # comment\n\treturn {'a': \"b\\n\"}",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa 00000000000000 .............. ________",
)
"""What users write, in scripts that tokenizers treat differently: Arabic, Swahili, Turkish, French, combining marks, Chinese, Japanese,
Korean, Devanagari, Thai, Hebrew, Cyrillic, Greek, Vietnamese, Ethiopic, emoji, white space, code."""

_TALKS: tuple[tuple[str, ...], ...] = (
    ("Hello.",),
    ("  A question with\n two lines,\ta \"quote\", a back\\slash, <b>, {{ braces }} and 'é🙂'? ",),
    ("Hello.", "Hello! How can I help?", "ما هي نبرة هذه العبارة؟"),
)
"""Messages of user and assistant by turns."""


def text_probes(contract: PromptContract) -> tuple[Probe, ...]:
    """`TEXTS` as prompts of this model, and one in which the user writes the model's own stop tokens; with the ids of its tokenizer."""
    names = contract.tokenizer.convert_ids_to_tokens(list(contract.stop_ids))
    texts = (*TEXTS, "before " + " between ".join(names) + " after" + "".join(names))
    rendered = [contract.render([{"role": "user", "content": text}], add_generation_prompt=True) for text in texts]
    return tuple(Probe(text, tuple(contract.tokenize(text))) for text in rendered)


def token_problems(tokenizer: Any, contract: PromptContract, prompts: Sequence[Probe]) -> list[str]:
    """At most one line: the first of the contract's probes, `prompts` and texts that the folder's tokenizer gives other ids for."""
    compared = (*contract.probes, *prompts, *text_probes(contract))
    differing = [(p, ids) for p in compared if (ids := tuple(int(i) for i in tokenizer.encode(p.text))) != p.ids]
    if not differing:
        return []
    probe, ids = differing[0]
    at = _first_difference(ids, probe.ids)
    others = f" ({len(differing)} of {len(compared)} texts differ)" if len(differing) > 1 else ""
    return [
        f"ONNX Runtime's tokenizer differs from the one trained with at token {at} of {probe.text[:60]!r}: "
        f"{list(ids[at : at + 3])} instead of {list(probe.ids[at : at + 3])}{others}"
    ]


def template_problems(tokenizer: Any, contract: PromptContract) -> tuple[list[str], list[str]]:
    """(differences between the folder's chat template as ONNX Runtime applies it and the contract's, what could not be compared)."""
    apply = getattr(tokenizer, "apply_chat_template", None)
    if apply is None:
        return [], ["the installed onnxruntime-genai applies no chat templates: they were not verified"]
    if "strftime_now" in contract.chat_template:
        return [], ["the chat template writes the day's date: what ONNX Runtime makes of it was not verified"]
    for talk in _TALKS:
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(talk)]
        expected = contract.render(messages, add_generation_prompt=True)
        try:
            found = str(apply(json.dumps(messages), add_generation_prompt=True))
        except RuntimeError as error:
            reason = first_line(error)
            return [], [f"ONNX Runtime cannot apply the model's chat template ({reason}): give it prompts as text"]
        if found != expected:
            at = _first_difference(found, expected)
            return [
                f"the chat template as ONNX Runtime applies it differs from the one trained with at character {at} of "
                f"{expected[:60]!r}: {found[at : at + 20]!r} instead of {expected[at : at + 20]!r}"
            ], []
    return [], []


def settle_tokenizer(folder: Path, contract: PromptContract) -> bool:
    """Write the tokenizer of an exported folder in a form that ONNX Runtime reads as it is meant, if it does not as it stands; whether so.

    It puts a blank after every special token of a tokenizer with Metaspace, whatever `prepend_scheme` says; blanks replaced by a
    normalizer are the same to tokenizers for texts that begin with a special token.
    """
    file = folder / "tokenizer.json"
    text = file.read_text(encoding="utf-8") if file.is_file() else "{}"
    values = json.loads(text)
    before = values.get("pre_tokenizer") or {}
    if before.get("type") != "Metaspace" or before.get("prepend_scheme") == "always" or values.get("normalizer"):
        return False
    blank = {"String": " "}
    replaced = {
        "normalizer": {"type": "Replace", "pattern": blank, "content": before.get("replacement", "▁")},
        "pre_tokenizer": {"type": "Split", "pattern": blank, "behavior": "MergedWithPrevious", "invert": False},
    }
    try:
        if not token_problems(onnx_runtime().Tokenizer(str(folder)), contract, ()):
            return False
        file.write_text(json.dumps(values | replaced, ensure_ascii=False), encoding="utf-8")
        if not token_problems(onnx_runtime().Tokenizer(str(folder)), contract, ()):
            return True
    except (RuntimeError, TypeError):  # what it cannot read is found, and said, when the folder is verified
        pass
    file.write_text(text, encoding="utf-8")
    return False


def _first_difference(found: Sequence[Any], expected: Sequence[Any]) -> int:
    pairs = enumerate(zip(found, expected, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(found), len(expected)))
