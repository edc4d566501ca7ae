"""How a row becomes what is learned: the parameters of Olive's text-generation pre-processing as fields of a data config.

Olive learns the whole text, prompt and all; so does what comes out here, except for pairs with a masked source. Where Olive lost or
mixed rows (the tail of joined rows, attention from one row to another), rows are kept and apart, and a note says so.
"""

from __future__ import annotations

from typing import Any

from phinetune.errors import did_you_mean
from phinetune.olive.context import Context
from phinetune.olive.eras import SUMMER
from phinetune.olive.reader import Reader, dotted

_LENGTH = 1024  # max_seq_len where a file gives none; before the summer of 2024 it had to
_STRATEGIES = {
    "line-by-line": "rows",
    "line-by-line-random": "rows",
    "join": "join",
    "join-random": "join",
    "join-sliding-window": "sliding-window",
}
_ROWS_APART = "no row sees another, where Olive's blocks let it; and the last block is learned though it is not full, where Olive left it out"
_PADDING = "batches are padded to their longest row, and the loss leaves padding out"
_CODE = "Python code of the file is not run; write the rows' texts to a file, or a template of their columns"
_DROPPED = {
    "pad_to_max_len": _PADDING,
    "padding_side": _PADDING,
    "use_attention_mask": "padding is never attended to",
    "drop_short_sequences": "short rows are learned too",
    "processing_batch_size": "it changes nothing but speed",
    "random_retries": "rows that are too short are not drawn again",
    "model_name": "the tokenizer is the input model's",
    "task": "text generation is the only task there is",
    "trust_remote_code": "the input model's own model_kwargs say it",
    "script_dir": "no Python code of the file is run",
    **dict.fromkeys(
        ("label_cols", "label_col", "input_cols", "align_labels", "kwargs"),
        "it belongs to other tasks, text generation never read it",
    ),
}
_SPECIAL = {
    True: "the tokenizer's own start token and the stop token are added, without the blanks that Olive put beside them",
    False: "the stop token is added all the same: a model that never learns it never stops",
}
_PAIRS = {"default": ("{input}", "{output}"), "self_instruct": ("{prompt}", "{completion}")}
_ALPACA = ("### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n", "{output}")


def text_values(keys: Reader, at: tuple[str, ...], context: Context) -> dict[str, Any]:
    """Fields of the native data config at `at` that say how rows become texts."""
    keys.refuse("text_formatting_func", _CODE)
    keys.refuse("user_script", _CODE)
    keys.drop_all(_DROPPED)
    kind = keys.take("dataset_type", str)
    if kind not in (None, "corpus", "pair"):
        place = keys.path("dataset_type")
        context.report.problem(
            place, f"must be corpus or pair (found: {kind!r}){did_you_mean(kind, ('corpus', 'pair'))}"
        )
    elif kind is not None:
        says = "prompt and completion say it" if kind == "pair" else "text says it, or chat"
        context.report.note("dropped", keys.path("dataset_type"), says, at)
    values = _pair(keys, at, context) if kind == "pair" else _corpus(keys, at, context)
    if keys.has("add_special_tokens") and values.get("chat"):
        keys.drop("add_special_tokens", "a chat template brings its own")
    elif keys.has("add_special_tokens"):
        place, given = keys.path("add_special_tokens"), keys.take("add_special_tokens", bool, True)
        context.report.note("changed", place, _SPECIAL[given], at)
    if keys.has("max_samples"):
        place = keys.path("max_samples")
        values["max_rows"] = keys.take("max_samples", int)
        if values.get("strategy", "rows") == "rows":
            context.report.renamed(place, (*at, "max_rows"))
        else:
            context.report.note(
                "changed", place, "is max_rows now and counts rows, not blocks of max_length", (*at, "max_rows")
            )
    return values


def _corpus(keys: Reader, at: tuple[str, ...], context: Context) -> dict[str, Any]:
    report = context.report
    values = _source(keys, at, context)
    name = keys.first("max_seq_len", "source_max_len")
    if name is None:
        report.note("default", keys.path("max_seq_len"), f"not given: {_LENGTH}, as in Olive", (*at, "max_length"))
    else:
        report.renamed(keys.path(name), (*at, "max_length"))
    length_at = keys.path(name or "max_seq_len")
    values["max_length"] = keys.take(name, int, _LENGTH) if name else _LENGTH
    name = keys.first("strategy", "corpus_strategy")
    place = keys.path(name or "strategy")
    given = keys.take(name, str) if name else None
    if given is None:
        given = "join" if context.era.since(SUMMER) else "line-by-line"
        report.note("default", place, f"not given: {given}, as in Olive {context.era.release}", (*at, "strategy"))
    if given not in _STRATEGIES:
        report.problem(
            place, f"must be one of {', '.join(_STRATEGIES)} (found: {given!r}){did_you_mean(given, _STRATEGIES)}"
        )
        return values
    if _STRATEGIES[given] == "rows" and name:
        report.note("renamed", place, f"{given} is {at[0]}.{at[1]}.strategy rows now", (*at, "strategy"))
    elif _STRATEGIES[given] != "rows":
        report.note(
            "changed", place, f"is {at[0]}.{at[1]}.strategy {_STRATEGIES[given]} now; {_ROWS_APART}", (*at, "strategy")
        )
    values["strategy"] = _STRATEGIES[given]
    if values["strategy"] == "rows" and not values.get("chat"):
        values["too_long"] = "cut"
    elif values["strategy"] == "rows":
        text = "longer chats are left out and counted, where Olive cut them"
        report.note("changed", length_at, text, (*at, "max_length"))
    values |= _blocks(given, keys, at, context)
    return values


def _blocks(given: str, keys: Reader, at: tuple[str, ...], context: Context) -> dict[str, Any]:
    """Stride, joiner and drawing, as far as the strategy `given` has them."""
    report = context.report
    values: dict[str, Any] = {}
    if given == "join-sliding-window":
        if not keys.has("stride"):
            report.problem(keys.path("stride"), "this key is needed beside join-sliding-window")
        values["stride"] = keys.take("stride", int)
    else:
        keys.drop("stride", f"{given} has no stride")
    if given.startswith("join"):
        if any("joiner" in group.values for group in keys.groups):
            values["joiner"] = keys.take("joiner", str, "") if keys.has("joiner") else ""
        else:
            values["joiner"] = "\n\n" if context.era.since(SUMMER) else ""
            said = f"{values['joiner']!r}" if values["joiner"] else "nothing between two rows"
            report.note(
                "default", keys.path("joiner"), f"not given: {said}, as in Olive {context.era.release}", (*at, "joiner")
            )
    else:
        keys.drop("joiner", f"{given} joins nothing")
    if given.endswith("-random"):
        for key in ("max_samples", "random_seed"):
            if not keys.has(key):
                report.problem(keys.path(key), f"this key is needed beside {given}")
        if keys.has("random_seed"):
            report.renamed(keys.path("random_seed"), (*at, "draw"))
            values["draw"] = keys.take("random_seed", int)
    else:
        keys.drop("random_seed", f"{given} draws nothing")
    return values


def _source(keys: Reader, at: tuple[str, ...], context: Context) -> dict[str, Any]:
    """What the text is made of: the first of chat_template, text_template and text_cols that is given."""
    report = context.report
    template = keys.take("chat_template", (bool, str))
    if template:
        said = "is chat: true now, in the model's own template" if template is True else "is chat_template now"
        report.note(
            "renamed" if template is not True else "changed",
            keys.path("chat_template"),
            f"{said}; the whole chat is learned (learn_prompt)",
            (*at, "chat"),
        )
        if keys.has("message_col"):
            report.renamed(keys.path("message_col"), (*at, "messages"))
        keys.drop_all(dict.fromkeys(("text_template", "text_cols"), "chat_template comes first"))
        values = {"messages": keys.take("message_col", str, "messages"), "chat": True, "learn_prompt": True}
        return values | ({"chat_template": template} if isinstance(template, str) else {})
    keys.drop("message_col", "it is read with chat_template only")
    if keys.has("text_template"):
        report.renamed(keys.path("text_template"), (*at, "text"))
        keys.drop("text_cols", "the template names the columns")
        return {"text": keys.take("text_template", str, "")}
    if keys.has("text_cols"):
        place, columns = keys.path("text_cols"), keys.take("text_cols", (str, list), [])
        columns = [columns] if isinstance(columns, str) else columns
        report.note("changed", place, f"is {dotted(at)}.text now, the columns with a blank between them", (*at, "text"))
        return {"text": " ".join(f"{{{column}}}" for column in columns)}
    report.note("default", keys.path("text_cols"), 'not given: the column "text", as in Olive', (*at, "text"))
    return {"text": "{text}"}


def _pair(keys: Reader, at: tuple[str, ...], context: Context) -> dict[str, Any]:
    """prompt and completion of `dataset_type: pair`."""
    report = context.report
    place, form = keys.path("pair_format"), keys.take("pair_format", str, "default")
    known = (*_PAIRS, "alpaca", "chip2", "custom")
    prompt, completion = _PAIRS.get(form, ("", ""))
    if form == "custom":
        prompt, completion = (_side(keys, side, at, context) for side in ("input", "output"))
    elif form == "alpaca":
        prompt, completion = _ALPACA
        text = "rows become Instruction, Input and Response sections; the introduction is left out, and an empty input stays as an empty section"
        report.note("changed", place, text, (*at, "prompt"))
    elif form == "chip2":
        report.problem(
            place,
            "chip2 rows hold both turns in one text; write them as the columns input and output, and leave pair_format out",
        )
    elif form not in known:
        report.problem(place, f"must be one of {', '.join(known)} (found: {form!r}){did_you_mean(form, known)}")
    elif keys.has("pair_format"):
        report.note("renamed", place, f"{form} is prompt {prompt} and completion {completion} now", (*at, "prompt"))
    else:
        report.note("default", place, "not given: the columns input and output, as in Olive", (*at, "prompt"))
    if form != "custom":
        keys.drop_all(
            {
                f"{a}_{b}": f"{form} has its own columns"
                for a in ("input", "output")
                for b in ("template", "col", "formatting_func")
            }
        )
    keys.drop_all(dict.fromkeys(("corpus_strategy", "strategy", "stride", "joiner", "random_seed"), "pairs are rows"))
    values: dict[str, Any] = {"prompt": prompt, "completion": completion, "chat": False}
    if keys.has("ignore_source_in_labels"):
        report.renamed(keys.path("ignore_source_in_labels"), (*at, "learn_prompt"))
        values["learn_prompt"] = not keys.take("ignore_source_in_labels", bool, True)
    source = keys.first("source_max_len", "max_seq_len")
    lengths = [key for key in (source, "target_max_len") if key and keys.has(key)]
    total = sum(keys.take(key, int, 0) for key in lengths)
    if len(lengths) == 2:
        for key in lengths:
            report.note("changed", keys.path(key), "source and target together are max_length now", (*at, "max_length"))
    else:
        for key in [key for key in ("source_max_len", "target_max_len") if key not in lengths]:
            report.problem(keys.path(key), "this key is needed beside dataset_type pair")
    return {**values, "max_length": total, "too_long": "cut"}


def _side(keys: Reader, side: str, at: tuple[str, ...], context: Context) -> str:
    """The template of one side of a custom pair: the first of its template and its column that is given."""
    keys.refuse(f"{side}_formatting_func", _CODE)
    native = "prompt" if side == "input" else "completion"
    name = keys.first(f"{side}_template", f"{side}_col")
    if name is None:
        context.report.problem(
            keys.path(f"{side}_template"), "this key is needed beside pair_format custom, or the column's name"
        )
        return ""
    place, value = keys.path(name), keys.take(name, str, "")
    context.report.renamed(place, (*at, native))
    return str(value) if name.endswith("template") else f"{{{value}}}"
