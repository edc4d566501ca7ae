"""Codes, scales and zero points of a built graph: read what it holds, put others in their place, one file rewritten.

The builder rounds every weight to the nearest code. Better codes are computed elsewhere (`ways.py`) for the model's own modules; here they
reach the graph: modules are found by the products that compute their rows, and what the graph then holds is read back and compared,
number by number. Not here: which codes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from phinetune.errors import ExportError
from phinetune.exporting.lora_inputs import ALIGNED, find_places, parts_of, set_place
from phinetune.model.grid import Codes, Grid, unpack


@dataclass(frozen=True)
class Stored:
    """A MatMulNBits node of a graph and the names of its tensors."""

    node: str
    grid: Grid
    inputs: int
    outputs: int
    weight: str
    scales: str
    zeros: str | None


def find_stored(model: Any) -> dict[str, Stored]:
    """Product (`/model/layers.0/attn/qkv_proj`, `/lm_head`) -> what the `onnx.ModelProto` says of its integers, not reading them."""
    found = {}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        values = {a.name: a.i for a in node.attribute}
        zeros = node.input[3] if len(node.input) > 3 and node.input[3] else None
        grid = Grid(values.get("bits", 4), values["block_size"], zeros is None)
        stem = re.sub(r"/MatMul(_matmul)?(_Q\d+)?$", "", node.name)
        found[stem] = Stored(stem, grid, values["K"], values["N"], node.input[1], node.input[2], zeros)
    return found


class GraphCodes:
    """The integers of the graph in the folder of an exported model."""

    def __init__(self, folder: Path) -> None:
        import onnx

        self.file = folder / "model.onnx"
        self.model = onnx.load(str(self.file), load_external_data=False)
        self.stored = find_stored(self.model)
        self.places = find_places(self.model)
        self.tensors = {t.name: t for t in self.model.graph.initializer}

    @property
    def scale_dtype(self) -> Any:
        """torch's dtype of the graph's scales."""
        import torch
        from onnx import TensorProto

        kinds = {TensorProto.FLOAT16: torch.float16, TensorProto.BFLOAT16: torch.bfloat16}
        found = {self.tensors[stored.scales].data_type for stored in self.stored.values()}
        return kinds.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32

    def parts(self, modules: Mapping[str, int], config: Mapping[str, Any]) -> dict[str, list[tuple[str, int, int]]]:
        """Product -> the (module, first row, row after the last) that make up its rows, in order.

        modules: name -> rows of the model's linear layers. Products that they do not cover are left out, and those whose last blocks are
        filled up because blocks do not divide their inputs.
        """
        owners: dict[str, tuple[str, int, int]] = {}
        for module, rows in modules.items():
            start = 0
            for part, size in parts_of(module, rows, config, {}).items():
                owners[part] = (module, start, start + size)
                start += size
        covered = {}
        for place in self.places.values():
            stored = self.stored.get(place.node)
            if stored is None or stored.inputs % stored.grid.block_size:
                continue
            if all(part in owners for part in place.parts):
                spans = [owners[part] for part in place.parts]
                if sum(stop - start for _, start, stop in spans) == place.outputs:
                    covered[place.node] = spans
        return covered

    def read(self, product: str) -> Codes:
        """What the graph holds for one product, (outputs, inputs)."""
        import torch

        stored = self.stored[product]
        scales = torch.from_numpy(self._array(stored.scales).astype(np.float32)).view(stored.outputs, -1)
        weight = torch.from_numpy(self._array(stored.weight)).view(*scales.shape, -1)
        zeros = None
        if stored.zeros is not None:
            zeros = torch.from_numpy(self._array(stored.zeros)).view(stored.outputs, -1)
        return unpack(stored.grid, weight, scales, zeros)

    def _array(self, name: str) -> np.ndarray[Any, Any]:
        """A tensor's values, flat."""
        from onnx import helper

        tensor = self.tensors[name]
        kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        place, offset, length = _place(tensor)
        if place is None:
            from onnx import numpy_helper

            return np.asarray(numpy_helper.to_array(tensor)).reshape(-1)
        with (self.file.parent / place).open("rb") as file:
            file.seek(offset)
            return np.frombuffer(file.read(length), kind).copy()

    def write(self, codes: Mapping[str, Codes]) -> None:
        """Put `codes` (product -> its rows') in the place of what the graph holds; both files are written anew.

        A product may get codes of other bits than it has; block size and zero points stay. Raises ExportError for a product that the
        graph does not have or whose shape is another.
        """
        changed: dict[str, bytes] = {}
        for product, new in codes.items():
            stored = self.stored.get(product)
            if stored is None or new.codes.shape != (stored.outputs, stored.inputs):
                raise ExportError(f"{product}: the graph has no product of {tuple(new.codes.shape)} to put codes into")
            if replace(new.grid, bits=stored.grid.bits) != stored.grid:
                raise ExportError(f"{product}: codes of {new.grid}, the graph has {stored.grid}")
            if new.grid.bits != stored.grid.bits:
                self._change_bits(stored, new.grid.bits)
            changed |= self._tensors_of(stored, new)
        self._rewrite(changed)

    def _change_bits(self, stored: Stored, bits: int) -> None:
        """Make room for codes of `bits` in a product, and in the embedding where it shares the product's weight."""
        from onnx import numpy_helper

        was, graph = stored.grid.bits, self.model.graph
        for name in filter(None, (stored.weight, stored.zeros)):
            dims = self.tensors[name].dims
            last = -(-stored.inputs // stored.grid.block_size) if name == stored.zeros else stored.grid.block_size
            dims[-1] = -(-last * bits // 8)
        readers = [n for n in graph.node if stored.weight in n.input]
        reshapes = [n for n in readers if n.op_type == "Reshape"]
        views = {output for n in reshapes for output in n.output}
        for node in [*readers, *(n for n in graph.node if views & set(n.input))]:
            if node.op_type not in ("MatMulNBits", "GatherBlockQuantized", "Reshape"):
                raise ExportError(
                    f"{stored.node}: its weight is read by {node.op_type} too, which has no bits to change"
                )
            for attribute in node.attribute:
                attribute.i = bits if attribute.name == "bits" else attribute.i
            if node.op_type == "MatMulNBits":
                node.name = node.name.removesuffix(f"_Q{was}") + f"_Q{bits}"
        for node in reshapes:
            shape = np.array([stored.outputs, stored.inputs * bits // 8], dtype=np.int64)
            node.input[1] = f"{stored.node}/shape_of_{bits}_bits"
            if not any(t.name == node.input[1] for t in graph.initializer):
                graph.initializer.append(numpy_helper.from_array(shape, node.input[1]))

    def _tensors_of(self, stored: Stored, new: Codes) -> dict[str, bytes]:
        """Tensor's name -> its new bytes."""
        from onnx import helper

        weight, zeros = new.packed()
        kind = helper.tensor_dtype_to_np_dtype(self.tensors[stored.scales].data_type)
        made = {stored.weight: weight.numpy(), stored.scales: new.scales.numpy().astype(kind)}
        if zeros is not None and stored.zeros is not None:
            made[stored.zeros] = zeros.numpy()
        if other := [name for name, values in made.items() if int(np.prod(self.tensors[name].dims)) != values.size]:
            raise ExportError(f"{stored.node}: {other[0]} has another size in the graph")
        return {name: np.ascontiguousarray(values).tobytes() for name, values in made.items()}

    def _rewrite(self, changed: Mapping[str, bytes]) -> None:
        """Write model.onnx.data with `changed` in it, and model.onnx that says where everything is now."""
        import onnx

        data = self.file.with_name(self.file.name + ".data")
        fresh = data.with_name(data.name + ".new")
        with fresh.open("wb") as target:
            for tensor in self.model.graph.initializer:
                place, _, _ = _place(tensor)
                if place is None:
                    if tensor.name in changed:
                        tensor.raw_data = changed[tensor.name]
                    continue
                target.write(b"\0" * (-target.tell() % ALIGNED))
                start = target.tell()
                for piece in [changed[tensor.name]] if tensor.name in changed else self._pieces(tensor):
                    target.write(piece)
                set_place(tensor, data.name, start, target.tell() - start)
        others = {p for t in self.model.graph.initializer if (p := _place(t)[0]) is not None} - {data.name}
        if others:
            raise ExportError(f"{self.file}: keeps weights in {', '.join(sorted(others))} as well")
        os.replace(fresh, data)
        onnx.save(self.model, str(self.file))
        self.stored = find_stored(self.model)

    def _pieces(self, tensor: Any) -> Iterator[bytes]:
        """A tensor's bytes as they are in the file, a few megabytes at a time."""
        place, offset, left = _place(tensor)
        with (self.file.parent / str(place)).open("rb") as source:
            source.seek(offset)
            while left > 0:
                piece = source.read(min(left, 1 << 24))
                if not piece:
                    raise ExportError(f"{self.file}: {tensor.name} goes beyond the end of {place}")
                left -= len(piece)
                yield piece


def _place(tensor: Any) -> tuple[str | None, int, int]:
    """(file beside the graph, offset, bytes) of a tensor; the file is None where the graph itself holds it."""
    import onnx

    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return None, 0, 0
    values = {entry.key: entry.value for entry in tensor.external_data}
    return values["location"], int(values.get("offset", 0)), int(values["length"])
