"""An adapter's factors as inputs of an ONNX graph: where they go, what they hold, and the graph with places for them.

    x ──┬── product (any precision) ─────────┬─> Add ──> as before
        └── MatMul(A: in x r) ── MatMul(B: r x out) ─┘

A and B are inputs that need not be given: their defaults have rank zero, so the graph without an adapter computes what it did. Ranks are
free; adapters of different ranks share one graph. Scaling is folded into B. Where the builder put several layers into one product
(q, k and v), the A's are stacked and the B's are block-diagonal; where it took one apart (Phi-3's gate_up_proj), B is cut. The products
themselves are not touched: quantized ones stay so, the factors stay floating point. One adapter may be put in for good instead
(`add_constants`): a graph that needs nobody to switch it on. Not here: files of adapters, proof that it is right.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from phinetune.errors import AdapterError, ExportError

if TYPE_CHECKING:
    import numpy as np

    from phinetune.lora.changes import Change

Sizes = dict[str, int]
"""Part of a layer -> its number of rows, in order."""
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(self_attn|attn|attention|mlp|feed_forward)\.(\w+)$")
_NODE = re.compile(r"^/model/layers\.(\d+)/(attn|mlp)/(\w+)$")
_PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_SAME = {"dense": "o_proj", "out_proj": "o_proj"}
_BLOCK = {"self_attn": "attn", "attention": "attn", "feed_forward": "mlp"}
_HEADS = ("lm_head", "embed_out")
ALIGNED = 64
"""Where a tensor begins in a file of weights: on whole lines of a processor's cache."""


@dataclass(frozen=True)
class Place:
    """A product of the graph, and the parts of layers whose rows it computes, in order."""

    node: str
    """`/model/layers.0/attn/qkv_proj`."""
    parts: tuple[str, ...]
    """`0.attn.q_proj`, `0.attn.k_proj`, `0.attn.v_proj`; `lm_head`."""
    inputs: int
    outputs: int

    @property
    def names(self) -> tuple[str, str]:
        """Names of the two inputs."""
        stem = self.node.strip("/").replace("/", ".")
        return f"{stem}.lora_A", f"{stem}.lora_B"


def part_name(module: str) -> str | None:
    """What a linear layer is called here, whatever its architecture calls it; None for one that has no name here."""
    if module.rpartition(".")[2] in _HEADS and _LAYER.search(module) is None:
        return "lm_head"
    found = _LAYER.search(module)
    return f"{found[1]}.{_BLOCK.get(found[2], found[2])}.{_SAME.get(found[3], found[3])}" if found else None


def parts_of(module: str, rows: int, config: Mapping[str, Any], given: dict[str, dict[str, int]]) -> Sizes:
    """The parts of the layer `module` of `rows` outputs, with their rows; nothing for a layer that has no name here.

    config: the base model's config.json; given: `LoraConfig.fused_modules`.
    """
    from phinetune.lora.fused import slices_of

    name = part_name(module)
    if name is None:
        return {}
    slices = slices_of(SimpleNamespace(**config), module, rows, given)
    if slices is None:
        return {name: rows}
    return {f"{name.rpartition('.')[0]}.{part}": size for part, size in slices.items()}


def find_places(model: Any) -> dict[str, Place]:
    """Part -> the product that computes it, over the products of an `onnx.ModelProto` that have a name here."""
    return find_places_in(model.graph)


def find_places_in(graph: Any) -> dict[str, Place]:
    """As `find_places`, of an `onnx.GraphProto`."""
    sizes = {t.name: tuple(t.dims) for t in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    places: dict[str, Place] = {}
    for node in graph.node:
        if node.op_type not in ("MatMul", "MatMulNBits"):
            continue
        stem = re.sub(r"/MatMul(_matmul)?(_Q\d+)?$", "", node.name)
        values = {a.name: a.i for a in node.attribute}
        weight = makers[node.input[1]].input[0] if node.input[1] in makers else node.input[1]
        shape = (values["K"], values["N"]) if "K" in values else sizes.get(weight, ())
        parts = _parts_of_node(stem)
        if parts and len(shape) == 2:
            place = Place(stem, parts, int(shape[0]), int(shape[1]))
            places |= dict.fromkeys(parts, place)
    return places


def _parts_of_node(stem: str) -> tuple[str, ...]:
    if stem == "/lm_head":
        return ("lm_head",)
    found = _NODE.match(stem)
    if found is None:
        return ()
    return tuple(f"{found[1]}.{found[2]}.{leaf}" for leaf in _PACKED.get(found[3], (found[3],)))


def lora_inputs(
    changes: Mapping[str, Change],
    places: Mapping[str, Place],
    layers: Mapping[str, int],
    config: Mapping[str, Any],
    given: dict[str, dict[str, int]],
) -> dict[str, np.ndarray[Any, Any]]:
    """Input's name -> values, float32: A (inputs, r) and B (r, outputs) of every product that `changes` reach.

    changes: module -> its factors, as `phinetune.lora.changes.read_changes` gives them; layers: module -> rows, of the base's linear
    layers. Raises AdapterError for modules that the graph has no product for, and for shapes that are not the graph's.
    """
    rows = {part: size for module, out in layers.items() for part, size in parts_of(module, out, config, given).items()}
    owned: dict[str, tuple[str, int, int]] = {}  # part -> (module that changes it, from, to), rows of its B
    problems = []
    for module, change in changes.items():
        sizes = parts_of(module, len(change.factors()[1]), config, given)
        if not sizes or not all(part in places for part in sizes):
            problems.append(f"{module}: the exported graph has no product of this layer to put factors beside")
        start = 0
        for part, size in sizes.items():
            owned[part] = (module, start, start + size)
            start += size
    if problems:
        raise AdapterError(problems, "merge this adapter instead: export --model ADAPTER")
    inputs: dict[str, Any] = {}
    for place in dict.fromkeys(places[part] for part in owned):
        inputs |= _factors(place, owned, changes, rows, problems)
    if problems:
        raise AdapterError(problems, "the adapter does not belong to this base model")
    return inputs


def _factors(
    place: Place,
    owned: dict[str, tuple[str, int, int]],
    changes: Mapping[str, Change],
    rows: Sizes,
    problems: list[str],
) -> dict[str, Any]:
    """The two inputs of one product; what is wrong goes to `problems`."""
    import torch

    sizes = {part: rows.get(part, place.outputs if len(place.parts) == 1 else -1) for part in place.parts}
    modules = list(dict.fromkeys(owned[part][0] for part in place.parts if part in owned))
    factors = {module: changes[module].factors() for module in modules}
    wrong = [m for m, (A, _) in factors.items() if A.shape[1] != place.inputs]
    wrong += [owned[p][0] for p in place.parts if p in owned and owned[p][2] - owned[p][1] != sizes[p]]
    if wrong or sum(sizes.values()) != place.outputs:
        problems.append(f"{', '.join(wrong or modules)}: does not fit {place.node} ({place.inputs} x {place.outputs})")
        return {}
    A = torch.cat([factors[m][0].float() for m in modules])
    B = torch.zeros(place.outputs, len(A))
    column = {m: sum(len(factors[n][0]) for n in modules[:i]) for i, m in enumerate(modules)}
    row = 0
    for part, size in sizes.items():
        if part in owned:
            module, start, stop = owned[part]
            own_A, own_B = factors[module]
            block = own_B[start:stop].float() * changes[module].scaling
            B[row : row + size, column[module] : column[module] + len(own_A)] = block
        row += size
    first, second = place.names
    return {first: A.t().contiguous().numpy(), second: B.t().contiguous().numpy()}


def add_inputs(file: Path, names: set[str]) -> dict[str, tuple[str, int, int]]:
    """Give the graph in `file` places for the factors of every product that one of `names` belongs to, in place.

    Weights in the file beside it are not touched. Returns the inputs: name -> (numpy's type, inputs, outputs of its product). Raises
    ExportError if a name belongs to no product.
    """
    import onnx
    from onnx import helper

    model = onnx.load(str(file), load_external_data=False)
    kind = activation_type(model.graph)
    made: dict[str, tuple[str, int, int]] = {}
    for place in _add_branches(model.graph, names, file):
        first, second = place.names
        rank = f"rank of {first.removesuffix('.lora_A')}"
        for name, shape, empty in (
            (first, [place.inputs, rank], [place.inputs, 0]),
            (second, [rank, place.outputs], [0, place.outputs]),
        ):
            model.graph.input.append(helper.make_tensor_value_info(name, kind, shape))
            model.graph.initializer.append(helper.make_tensor(name, kind, empty, b"", raw=True))
            made[name] = (helper.tensor_dtype_to_np_dtype(kind).name, place.inputs, place.outputs)
    onnx.save(model, str(file))
    return made


def add_constants(file: Path, values: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Put the factors `values` (as `lora_inputs` gives them) into the graph in `file`, for good and in its type, in place.

    Factors go to the end of the file of weights beside it. Raises ExportError if a name belongs to no product, AdapterError for a value
    that the graph's type cannot hold.
    """
    import numpy as np
    import onnx
    from onnx import helper

    model = onnx.load(str(file), load_external_data=False)
    kind = activation_type(model.graph)
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    typed = {name: np.ascontiguousarray(array.astype(dtype)) for name, array in values.items()}
    if broken := [name for name, array in typed.items() if not np.isfinite(array).all()]:
        raise AdapterError(f"{', '.join(broken[:3])}: not finite in {dtype.name}", "export in fp32")
    _add_branches(model.graph, set(values), file)
    data = file.with_name(file.name + ".data")
    with data.open("ab") as target:
        for name, array in typed.items():
            target.write(b"\0" * (-target.tell() % ALIGNED))
            tensor = model.graph.initializer.add(name=name, data_type=kind, dims=array.shape)
            tensor.data_location = onnx.TensorProto.EXTERNAL
            set_place(tensor, data.name, target.tell(), array.nbytes)
            target.write(array.tobytes())
    onnx.save(model, str(file))


def _add_branches(graph: Any, names: set[str], file: Path) -> list[Place]:
    """Put the two products and the sum beside every product that one of `names` belongs to; the places. The factors are still lacking."""
    from onnx import helper

    places = {place.node: place for place in find_places_in(graph).values() if set(place.names) & names}
    if missing := names - {name for place in places.values() for name in place.names}:
        raise ExportError(f"{file}: no product takes {', '.join(sorted(missing))}")
    nodes, done = [], []
    for node in graph.node:
        nodes.append(node)
        place = places.get(re.sub(r"/MatMul(_matmul)?(_Q\d+)?$", "", node.name))
        if place is None or node.op_type not in ("MatMul", "MatMulNBits"):
            continue
        output, (first, second) = node.output[0], place.names
        node.output[0] = f"{place.node}/base/output_0"
        stem = f"{place.node}/lora"
        nodes.append(helper.make_node("MatMul", [node.input[0], first], [f"{stem}_A/output_0"], f"{stem}_A/MatMul"))
        nodes.append(
            helper.make_node("MatMul", [f"{stem}_A/output_0", second], [f"{stem}_B/output_0"], f"{stem}_B/MatMul")
        )
        nodes.append(helper.make_node("Add", [node.output[0], f"{stem}_B/output_0"], [output], f"{stem}/Add"))
        done.append(place)
    del graph.node[:]
    graph.node.extend(nodes)
    return done


def set_place(tensor: Any, location: str, offset: int, length: int) -> None:
    """Say where in the file `location` beside the graph the values of an `onnx.TensorProto` are."""
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value


def activation_type(graph: Any) -> int:
    """ONNX's number of the type that the graph computes in: that of its key/value cache. Raises ExportError if factors cannot have it."""
    import onnx

    kinds = {i.type.tensor_type.elem_type for i in graph.input if i.name.startswith("past")}
    known = kinds & {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16}
    if len(known) != 1:
        names = ", ".join(sorted(onnx.TensorProto.DataType.Name(k) for k in kinds)) or "nothing known"
        raise ExportError(f"factors are given as float32 or float16, the graph computes in {names}")
    return int(known.pop())
