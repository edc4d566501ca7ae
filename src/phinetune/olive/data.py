"""`data_configs` as `data`: which container, its four components in every spelling, and the rows they load.

Before 0.6.2 a parameter could stand in three places, of which the more particular counted; since then each component has its own group,
flat or not. All of them are read here, the particular before the general. How a row becomes text is in `texts.py`.
"""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any

from phinetune.errors import did_you_mean
from phinetune.olive.context import Context
from phinetune.olive.reader import Reader
from phinetune.olive.resources import is_resource, resource
from phinetune.olive.texts import text_values

CONTAINERS = ("DataContainer", "HuggingfaceContainer")
_RANDOM = (
    "DummyDataContainer",
    "RawDataContainer",
    "TransformersDummyDataContainer",
    "TransformersPromptDummyDataContainer",
    "TransformersTokenDummyDataContainer",
)
_COMPONENTS = ("load_dataset", "pre_process_data", "post_process_data", "dataloader")
_GROUPS = ("params_config", "components", *(f"{name}_config" for name in _COMPONENTS))
_FUNCTIONS = {
    "load_dataset": ("huggingface_dataset",),
    "pre_process_data": ("text_generation_huggingface_pre_process", "huggingface_pre_process", "skip_pre_process"),
    "post_process_data": ("text_generation_post_process", "post_process", "skip_post_process"),
    "dataloader": ("default_dataloader", "dataloader", "skip_dataloader", "no_auto_batch_dataloader"),
}
_FORMATS = ("json", "csv", "parquet")
_HUB_ONLY = "how the hub is reached is not the workflow's business; set HF_TOKEN and HF_HOME"
_LOADING = {
    **dict.fromkeys(("token", "use_auth_token", "cache_dir", "storage_options", "download_config"), _HUB_ONLY),
    **dict.fromkeys(
        ("streaming", "num_proc", "keep_in_memory", "save_infos"),
        "files are read row by row as they are needed",
    ),
    **dict.fromkeys(
        ("verification_mode", "ignore_verifications", "download_mode"), "a data set is checked as it is read"
    ),
    "trust_remote_code": "no Python code of a data set is run",
}
_BATCHES = "batches are made by the pass: training_config.per_device_train_batch_size"
_CODE = "Python code that makes rows is not run; write the rows to a file and give it as data_files"


def data_configs(top: Reader, context: Context) -> None:
    """Put every data config of the file into `context.data`."""
    given = top.take("data_configs", (dict, list))
    if isinstance(given, dict):
        for name, config in given.items():
            outer = context.report.open(config, f"data_configs.{name}")
            inner = outer.take("name", str)
            if inner is not None and inner != name:
                context.report.note("dropped", outer.path("name"), f"the data config goes by its key, {name}")
            data_config(name, outer, context)
    for index, config in enumerate(given if isinstance(given, list) else []):
        outer = context.report.open(config, f"data_configs[{index}]")
        if not outer.has("name"):
            context.report.problem(outer.path("name"), "this key is needed")
        name = outer.take("name", str, "")
        if name in context.data:
            context.report.problem(outer.path("name"), f"two data configs are called {name!r}")
        data_config(name, outer, context)


def data_reference(keys: Reader, key: str, hint: str, context: Context) -> str | None:
    """The name of the data config that `key` refers to; one that stands there itself is taken in under its name or `hint`."""
    if not keys.has(key):
        return None
    value, place = keys.take(key), keys.path(key)
    if isinstance(value, dict):
        outer = context.report.open(value, place)
        name = context.free_name(outer.take("name", str, hint), context.data)
        context.report.note("changed", place, f"is data.{name} now", ("data", name))
        data_config(name, outer, context)
        return name
    return context.data_name(value, place)


def data_config(name: str, outer: Reader, context: Context, params: Reader | None = None) -> None:
    """Put the data config that `outer` reads into `context.data`; `params` are its params_config if that stands elsewhere."""
    if not outer.has("type"):
        context.report.note(
            "default",
            outer.path("type"),
            "not given: read as HuggingfaceContainer, the one that holds text",
            ("data", name),
        )
    kind = outer.take("type", str, CONTAINERS[1])
    known = {one.lower(): one for one in (*CONTAINERS, *_RANDOM)}
    if kind.lower() not in known:
        text = f"only HuggingfaceContainer holds text{did_you_mean(kind, known.values())} (found: {kind!r})"
        context.report.problem(outer.path("type"), text)
    context.data[name] = None
    if known.get(kind.lower()) in _RANDOM:
        place = outer.groups[0].path
        context.report.note("dropped", place, f"{kind} makes random rows; what is measured is measured on real ones")
        for key in (*_GROUPS, "user_script", "script_dir"):
            outer.take(key)
        return
    outer.refuse("user_script", _CODE)
    outer.drop("script_dir", "no Python code of the file is run")
    params = params or outer.group("params_config")
    particular = params.group("component_kwargs") if params else None
    components = outer.group("components")
    readers = {one: _component(one, outer, params, particular, components, context) for one in _COMPONENTS}
    at = ("data", name)
    values = _rows(readers["load_dataset"], at, context)
    values |= text_values(readers["pre_process_data"], at, context)
    readers["post_process_data"].drop_all(dict.fromkeys(("model_name", "task"), "labels are made with the rows' texts"))
    readers["dataloader"].drop_all(
        dict.fromkeys(
            ("batch_size", "shuffle", "drop_last", "num_workers", "pin_memory", "task", "model_name"), _BATCHES
        )
    )
    context.data[name] = values


def _component(
    name: str,
    outer: Reader,
    params: Reader | None,
    particular: Reader | None,
    components: Reader | None,
    context: Context,
) -> Reader:
    """A reader of one component's parameters, wherever they stand; its function is checked."""
    new = outer.group(f"{name}_config")
    own = particular.group(name) if particular else None
    old = components.group(name) if components else None
    for holder in (new, old):
        if holder is None:
            continue
        if holder.has("type"):
            place, kind = holder.path("type"), str(holder.take("type", str, ""))
            if kind.lower() not in _FUNCTIONS[name]:
                meant = did_you_mean(kind.lower(), _FUNCTIONS[name])
                context.report.problem(place, f"{_CODE}{meant} (found: {kind!r})")
        if holder is old:
            holder.drop("name", "a component goes by its key")
    groups = new.flat("params").groups if new else []
    for reader in (own, params, old.group("params") if old else None):
        groups += reader.groups if reader else []
    return (
        Reader(context.report, groups) if groups else context.report.open({}, outer.groups[0].place(f"{name}_config"))
    )


def _rows(load: Reader, at: tuple[str, ...], context: Context) -> dict[str, Any]:
    """path, subset, split and rows of what the load_dataset component loads."""
    report = context.report
    load.drop_all(_LOADING)
    load.refuse("col_filters", "rows cannot be filtered here; write the rows that are meant to a file")
    load.refuse(
        "revision", "a revision of a hub data set cannot be named here; download it and give the file as data_files"
    )
    if typo := load.first("data_name", "dataset_name"):
        place, name = load.path(typo), load.take(typo, str, "")
        if typo == "dataset_name":
            report.renamed(place, (*at, "path"))
    else:
        name, place = "", load.path("data_name")
        if not load.has("data_files"):
            report.problem(place, "this key is needed")
    load.refuse("data_dir", "a folder of a data set cannot be named here; give the file itself as data_files")
    if load.has("data_files"):
        return _file(load, name, place, at, context)
    if name in (*_FORMATS, "text"):
        report.problem(load.path("data_files"), f"this key is needed beside data_name {name!r}")
    if name and place.endswith(".data_name"):
        report.renamed(place, (*at, "path"))
    values: dict[str, Any] = {"path": name}
    if load.has("subset"):
        values["subset"] = load.take("subset", str)
    elif load.has("name"):
        report.renamed(load.path("name"), (*at, "subset"))
        values["subset"] = load.take("name", str)
    if not load.has("split"):
        report.note("default", load.path("split"), "not given: validation, as in Olive", (*at, "split"))
    return values | _split(load.take("split", str, "validation"), load, at, context)


def _file(load: Reader, name: str, place: str, at: tuple[str, ...], context: Context) -> dict[str, Any]:
    """path and rows of a data file."""
    report = context.report
    files_at = load.path("data_files")
    files = load.take("data_files", (str, list, dict))
    load.drop("subset", "a file has no subsets")
    given_split = load.take("split", str) if load.has("split") else None
    split_at = load.path("split")
    split = _split(given_split or "train", load, at, context)
    if isinstance(files, dict) and not is_resource(files):
        wanted = split["split"]
        if wanted not in files:
            report.problem(
                f"{files_at}.{wanted}", f"no file is named for the split {wanted!r}{did_you_mean(wanted, files)}"
            )
        for other in files:
            if other != wanted:
                report.note(
                    "dropped",
                    f"{files_at}.{other}",
                    f"the split in use is {wanted}; another file is another data config",
                )
        files, files_at = files.get(wanted, ""), f"{files_at}.{wanted}"
    if isinstance(files, list) and len(files) == 1:
        files, files_at = files[0], f"{files_at}[0]"
    if isinstance(files, list):
        report.problem(files_at, f"a data config reads one file; put the {len(files)} files into one")
        return {"path": ""}
    if name and name not in _FORMATS:
        reason = (
            "text files hold no rows; write a JSON Lines file with one object per text"
            if name == "text"
            else "only json, csv and parquet files are read"
        )
        report.problem(place, f"{reason} (found: {name!r})")
    elif name and place.endswith(".data_name"):
        report.note("dropped", place, "the file's ending says what it is", (*at, "path"))
    if given_split is None:
        report.note("default", split_at, "not given: all rows of the file (Olive's own, validation, is in no file)", at)
    elif isinstance(files, str | dict):
        report.note(
            "dropped", split_at, "a file is one split" + ("; its slice is rows now" if "rows" in split else ""), at
        )
    path = resource(files, files_at, (*at, "path"), context) or ""
    if PurePath(path).suffix.lower() == ".txt":
        report.problem(
            files_at, f"text files hold no rows; write a JSON Lines file with one object per text (found: {path!r})"
        )
    return {"path": _from_root(path, files_at, context), **({"rows": split["rows"]} if "rows" in split else {})}


def _from_root(path: str, place: str, context: Context) -> str:
    """`path`, under the file's data_root if it has one."""
    if context.data_root is None or PurePath(path).is_absolute() or path.startswith("azureml:"):
        return path
    context.data_root_used = True
    context.report.note("changed", place, "data_root is put before it")
    return f"{context.data_root.rstrip('/')}/{path}"


def _split(text: str, load: Reader, at: tuple[str, ...], context: Context) -> dict[str, Any]:
    """split, and rows where it is a slice such as train[:70%]."""
    found = re.fullmatch(r"([\w.\-]+)(\[[^\[\]]*\])?", text)
    if found is None:
        context.report.problem(
            load.path("split"), f"must be one split, or a slice such as train[:70%] (found: {text!r})"
        )
        return {"split": text}
    return {"split": found[1], **({"rows": found[2]} if found[2] else {})}
