"""The models that are averaged, in one table.

The shapes are those of published models, tensor by tensor, under the names that their
implementations give them. The values are drawn: each tensor has the spread that such a tensor has
(He et al., 2015, for matrices and kernels; about 1 for the scales of normalisations), and each
client has the common model and noise of its own. No two clients share memory, so that what is
measured includes reading every client's update from memory once.
"""
# ruff: noqa: RUF001  (titles have the signs that printed tables have)

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from math import prod, sqrt
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "MLP_2NN",
    "MLP_SMALL",
    "ONE_TENSOR",
    "WORKLOADS",
    "Params",
    "Shapes",
    "WeightedUpdate",
    "Workload",
    "bert_base",
    "cut",
    "draw_updates",
    "llm_slice",
    "lora_adapter",
    "resnet50",
]

Shapes: TypeAlias = "dict[str, tuple[int, ...]]"
Params: TypeAlias = "dict[str, npt.NDArray[Any]]"
WeightedUpdate: TypeAlias = "tuple[Params, int]"

_LEAST_SAMPLES, _MOST_SAMPLES = 200, 1_200  # a client's weight; a float16 sum of ten stays finite
_CLIENT_NOISE = 0.05  # of the tensor's own spread


def resnet50() -> Shapes:
    """ResNet-50 (He et al., 2016) as in torchvision: 161 tensors, 25,557,032 parameters."""
    shapes: Shapes = {"conv1.weight": (64, 3, 7, 7)}

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = (width,)
        shapes[f"{name}.bias"] = (width,)

    norm("bn1", 64)
    inputs = 64
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=1):
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            outputs = 4 * width
            kernels = ((width, inputs, 1, 1), (width, width, 3, 3), (outputs, width, 1, 1))
            for number, kernel in enumerate(kernels, start=1):
                shapes[f"{at}.conv{number}.weight"] = kernel
                norm(f"{at}.bn{number}", kernel[0])
            if block == 0:
                shapes[f"{at}.downsample.0.weight"] = (outputs, inputs, 1, 1)
                norm(f"{at}.downsample.1", outputs)
            inputs = outputs
    shapes["fc.weight"] = (1000, 2048)
    shapes["fc.bias"] = (1000,)
    return shapes


def bert_base() -> Shapes:
    """BERT-base, uncased (Devlin et al., 2019): 199 tensors, 109,482,240 parameters."""
    width, inner = 768, 3072
    shapes: Shapes = {}

    def dense(name: str, outputs: int, inputs: int) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        shapes[f"{name}.bias"] = (outputs,)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = (width,)
        shapes[f"{name}.bias"] = (width,)

    for table, rows in (("word", 30522), ("position", 512), ("token_type", 2)):
        shapes[f"embeddings.{table}_embeddings.weight"] = (rows, width)
    norm("embeddings.LayerNorm")
    for layer in range(12):
        at = f"encoder.layer.{layer}"
        for part in ("query", "key", "value"):
            dense(f"{at}.attention.self.{part}", width, width)
        dense(f"{at}.attention.output.dense", width, width)
        norm(f"{at}.attention.output.LayerNorm")
        dense(f"{at}.intermediate.dense", inner, width)
        dense(f"{at}.output.dense", width, inner)
        norm(f"{at}.output.LayerNorm")
    dense("pooler.dense", width, width)
    return shapes


def llm_slice() -> Shapes:
    """Two projections of a 7B LLaMA's MLP (Touvron et al., 2023): 2 of 4096 × 11008, 90 M."""
    return {
        "layers.0.mlp.up_proj.weight": (11008, 4096),
        "layers.0.mlp.down_proj.weight": (4096, 11008),
    }


def lora_adapter() -> Shapes:
    """A LoRA adapter (Hu et al., 2022) of 1,200 tensors of 8,192: rank 8, width 1024, 9.8 M."""
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    return {
        f"layers.{layer}.{projection}.lora_{side}.weight": (8, 1024) if side == "A" else (1024, 8)
        for layer in range(100)
        for projection in projections
        for side in ("A", "B")
    }


MLP_2NN: Shapes = {
    "dense1.weight": (200, 784),
    "dense1.bias": (200,),
    "dense2.weight": (200, 200),
    "dense2.bias": (200,),
    "dense3.weight": (10, 200),
    "dense3.bias": (10,),
}
"""The "2NN" that McMahan et al. (2017) train on MNIST: 199,210 parameters."""


MLP_SMALL: Shapes = {
    "dense1.weight": (32, 784),
    "dense1.bias": (32,),
    "dense2.weight": (10, 32),
    "dense2.bias": (10,),
}
"""A perceptron with one hidden layer of 32 on MNIST: 25,450 parameters."""


ONE_TENSOR: Shapes = {"weight": (64, 64)}
"""The least that has every part of the work."""


@dataclass(frozen=True)
class Workload:
    """So many clients that send one model.

    Attributes:
        name: What it is called on the command line.
        title: What it is called in a table.
        make_shapes: Gives the tensors' names and shapes.
        clients: How many updates come in each round.
        dtype: ``"float32"`` or ``"float16"``.
    """

    name: str
    title: str
    make_shapes: Callable[[], Shapes]
    clients: int
    dtype: str

    @cached_property
    def shapes(self) -> Shapes:
        """The tensors' names and shapes."""
        return self.make_shapes()

    @property
    def parameters(self) -> int:
        """How many numbers one update holds."""
        return sum(prod(shape) for shape in self.shapes.values())

    @property
    def nbytes(self) -> int:
        """How many bytes one update holds."""
        return self.parameters * np.dtype(self.dtype).itemsize


_MODELS: Sequence[tuple[str, str, Callable[[], Shapes], dict[str, int]]] = (
    ("resnet50", "ResNet-50", resnet50, {"float32": 10, "float16": 4}),
    ("bert", "BERT-base", bert_base, {"float32": 2, "float16": 2}),
    ("llm", "LLM slice", llm_slice, {"float32": 4, "float16": 2}),
    ("lora", "LoRA adapter", lora_adapter, {"float32": 8, "float16": 8}),
)

WORKLOADS: dict[str, Workload] = {
    f"{name}-{dtype}": Workload(
        f"{name}-{dtype}", f"{title} × {clients}, {dtype}", make_shapes, clients, dtype
    )
    for name, title, make_shapes, by_dtype in _MODELS
    for dtype, clients in by_dtype.items()
}
"""Every model in every dtype, by its name on the command line."""


def cut(workload: Workload, most: int = 1 << 10, tensors: int = 100, clients: int = 3) -> Workload:
    """The same workload, smaller.

    Args:
        workload: The whole one.
        most: No tensor keeps more elements than this, if its first row has fewer.
        tensors: No more tensors than this are kept.
        clients: No more clients than this are kept.

    Returns:
        One with the first tensors of the same names, the large ones with their first rows only.
    """
    shapes = {
        key: (max(1, min(shape[0], most // prod(shape[1:]))), *shape[1:])
        for key, shape in islice(workload.shapes.items(), tensors)
    }
    kept = min(clients, workload.clients)
    title = f"{workload.title}, cut down to {kept} clients of {sum(map(prod, shapes.values())):,}"
    return Workload(workload.name, title, lambda: shapes, kept, workload.dtype)


def draw_updates(
    shapes: Shapes, clients: int, dtype: str = "float32", seed: int = 0
) -> list[WeightedUpdate]:
    """The updates of one round.

    Args:
        shapes: The tensors.
        clients: How many updates.
        dtype: A float dtype.
        seed: Of the draw.

    Returns:
        For each client its parameters and its weight, a number of samples. All arrays are new
        memory; the same arguments give the same values.
    """
    rng, *own = np.random.default_rng(seed).spawn(1 + clients)
    common = {}
    for key, shape in shapes.items():
        values = rng.standard_normal(shape, np.float32) * np.float32(_spread(shape))
        if len(shape) == 1 and key.endswith("weight"):  # the scale of a normalisation
            values += 1
        common[key] = values

    def draw(rng: np.random.Generator) -> WeightedUpdate:
        params = {}
        for key, values in common.items():
            noise = rng.standard_normal(values.shape, np.float32)
            noise *= np.float32(_CLIENT_NOISE * _spread(values.shape))
            noise += values
            params[key] = noise.astype(dtype, copy=False)
        return params, int(rng.integers(_LEAST_SAMPLES, _MOST_SAMPLES))

    with ThreadPoolExecutor() as pool:
        return list(pool.map(draw, own))


def _spread(shape: tuple[int, ...]) -> float:
    return sqrt(2 / prod(shape[1:])) if len(shape) > 1 else 0.1
