"""What the tensors of a checkpoint are, whatever it calls them.

A *scheme* is what is declared (``checkpoint.declared``); a *layer* is what the tensors are. Data is
trusted over declarations: a layer is quantized if and only if it has quantized data and a scale.
Where the two disagree there is a finding (``checkpoint.contradictions``), never a guess. Block
sizes come from the declaration, never from the ratio of two shapes (576 rows and 5 scales fit many
blocks).

``weight_scale_inv`` on disk is the multiplier that dequantizes, despite its name.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

from blockscale.checkpoint.contradictions import contradictions
from blockscale.checkpoint.declared import Scheme, SchemeKind, TargetMatcher, scheme_of
from blockscale.checkpoint.scale_names import (
    PACKED_SUFFIX,
    WEIGHT_SUFFIX,
    scale_names,
    stored_scales,
)
from blockscale.checkpoint.skips import SkipMatcher
from blockscale.errors import CheckpointError
from blockscale.formats import E4M3FN, BlockFormat, BlockShape, ScaleFormat
from blockscale.planning.plan import Finding, SkippedLayer

if TYPE_CHECKING:
    from blockscale.checkpoint.header import TensorEntry
    from blockscale.checkpoint.read import Checkpoint
    from blockscale.checkpoint.skips import Reader

__all__ = [
    "FLOAT_DTYPES",
    "TABLES",
    "WEIGHT_SUFFIX",
    "Foreign",
    "ForeignLayer",
    "Layers",
    "QuantizedLayer",
    "Scheme",
    "SchemeKind",
    "Survey",
    "read_layers",
    "scheme_of",
    "survey",
]

FP8_DATA = "F8_E4M3"
FLOAT_DTYPES = frozenset({"BF16", "F16", "F32"})
# Modules whose rows are looked up, whatever is declared: no linear layer, though a matrix.
TABLES = (
    "embed_tokens", "embeddings", "tok_embeddings", "word_embeddings", "embed", "wte", "wpe",
)  # fmt: skip
# Two FP4 values in a byte (DeepSeek-V4: I8; ModelOpt and compressed-tensors: U8; safetensors: F4).
PACKED_DTYPES = frozenset({"I8", "U8", "F4"})
# U8 holds E8M0 exponents in MXFP8 checkpoints. F16 is restated exactly.
SCALE_DTYPES = {
    "F32": ScaleFormat.FP32,
    "F16": ScaleFormat.FP32,
    "BF16": ScaleFormat.BF16,
    "F8_E8M0": ScaleFormat.UE8M0,
    "U8": ScaleFormat.UE8M0,
}
_MATRIX_AXES = 2
_USUAL_BLOCKS = tuple(
    BlockShape(*size) for size in ((128, 128), (64, 64), (32, 32), (1, 128), (1, 32))
)
_STACKED_AXES = 3
# OCP MX: 32 FP4 values share an E8M0; NVFP4: 16 share an E4M3.
_FP4_BLOCKS = {"F8_E8M0": 32, "U8": 32, "F8_E4M3": 16}


class Foreign(Enum):
    """What to do with layers that are quantized, but not in block FP8."""

    REFUSE = "refuse"
    """Raise: whoever runs the checkpoint would run them wrongly."""
    REPORT = "report"
    """List them beside the others."""


@dataclass(frozen=True, slots=True)
class QuantizedLayer:
    """A block-FP8 weight. ``format.scale`` is what the stored scales are.

    ``scale.shape`` is the grid of blocks, whatever axes of length one the file writes between them
    (ModelOpt: (rows, 1, columns, 1)). ``is_scale_shared``: ``scale`` is one expert's part of a
    tensor that holds the scales of all.
    """

    name: str
    weight: TensorEntry
    scale: TensorEntry
    format: BlockFormat
    is_scale_shared: bool = False

    @property
    def n(self) -> int:
        """Rows of the weight."""
        return self.weight.shape[-2]

    @property
    def k(self) -> int:
        """Columns of the weight."""
        return self.weight.shape[-1]

    @property
    def stacked(self) -> int | None:
        """Experts stacked in one tensor, None for a plain matrix."""
        return self.weight.shape[0] if len(self.weight.shape) > _MATRIX_AXES else None


@dataclass(frozen=True, slots=True)
class ForeignLayer:
    """A weight that is quantized in another way than block FP8. ``detail`` says how, in words."""

    name: str
    kind: SchemeKind
    detail: str
    weight: TensorEntry
    scale: TensorEntry | None

    @property
    def n(self) -> int:
        """Rows of the weight, 1 if it has none."""
        return self.weight.shape[-2] if len(self.weight.shape) >= _MATRIX_AXES else 1

    @property
    def k(self) -> int:
        """Values in a row of the weight, packed ones counted each."""
        return _values_in_a_row(self.weight, self.kind)


@dataclass(frozen=True, slots=True)
class Layers:
    """Every linear layer of a checkpoint, quantized or not, and what is wrong with it."""

    scheme: Scheme
    quantized: tuple[QuantizedLayer, ...]
    skipped: tuple[SkippedLayer, ...]
    findings: tuple[Finding, ...]
    foreign: tuple[ForeignLayer, ...] = ()


@dataclass(frozen=True, slots=True)
class Survey:
    """All layers that can be read, and every reason why one cannot."""

    layers: Layers
    problems: tuple[CheckpointError, ...]


def read_layers(checkpoint: Checkpoint, foreign: Foreign = Foreign.REFUSE) -> Layers:
    """Every linear layer, with findings where data and declaration disagree.

    Raises CheckpointError, naming file and tensor, where a quantized layer cannot be read at all:
    no scale, a scale of the wrong shape or dtype, an unknown declaration. Layers in another
    quantization raise too, unless ``foreign`` is REPORT and there are block-FP8 layers beside them.
    """
    found = survey(checkpoint)
    if found.problems:
        raise _with_count(found.problems[0], len(found.problems) - 1)
    layers = found.layers
    if layers.foreign and (foreign is Foreign.REFUSE or not layers.quantized):
        raise _foreign_error(layers)
    return layers


def survey(checkpoint: Checkpoint) -> Survey:
    """What every weight is, with the problems of those that cannot be read.

    Raises CheckpointError only if the declaration itself cannot be understood.
    """
    reader = _Pass(checkpoint, scheme_of(checkpoint))
    reader.read()
    layers = reader.layers()
    findings = contradictions(checkpoint, layers, reader.skipped_by, reader.used)
    return Survey(replace(layers, findings=findings), tuple(reader.problems))


def _with_count(error: CheckpointError, others: int) -> CheckpointError:
    if not others:
        return error
    problem = f"{error.problem} (the first of {others + 1} such problems)"
    return CheckpointError(error.path, problem, tensor=error.tensor)


def _foreign_error(layers: Layers) -> CheckpointError:
    first = layers.foreign[0]
    counts = Counter(layer.kind.value for layer in layers.foreign)
    words = ", ".join(f"{count} layers are {kind}" for kind, count in counts.most_common())
    return CheckpointError(
        first.weight.path,
        f"is {first.detail}, not block FP8 ({words}); blockscale runs block-scaled FP8 only, serve "
        "this checkpoint with an engine that has a path for it",
        tensor=first.weight.name,
    )


class _Pass:
    """One pass over the tensors, in file order."""

    def __init__(self, checkpoint: Checkpoint, scheme: Scheme) -> None:
        self._checkpoint = checkpoint
        self._scheme = scheme
        self._targets = TargetMatcher(scheme)
        self._skips = SkipMatcher(scheme.skips)
        self._quantized: list[QuantizedLayer] = []
        self._foreign: list[ForeignLayer] = []
        self._floats: list[SkippedLayer] = []
        self.problems: list[CheckpointError] = []
        self.skipped_by: dict[str, tuple[Reader, ...]] = {}
        self.used: set[str] = set()

    def layers(self) -> Layers:
        """What was found, without findings."""
        return Layers(
            self._scheme,
            tuple(self._quantized),
            tuple(self._floats),
            (),
            tuple(self._foreign),
        )

    def read(self) -> None:
        """Look at every tensor. Packed weights first: some of their scales are E4M3 themselves."""
        entries = self._checkpoint.tensors.values()
        for entry in entries:
            if entry.dtype in PACKED_DTYPES:
                self._read_packed(entry)
        for entry in entries:
            if entry.dtype == FP8_DATA and entry.name not in self.used:
                try:
                    self._read_fp8(entry)
                except CheckpointError as error:
                    self.problems.append(error)
            elif entry.dtype == "F8_E5M2":
                self._add_foreign(entry, None, SchemeKind.E5M2, "E5M2 FP8 (F8_E5M2)")
            elif _is_float_linear(entry):
                self._read_float(entry)

    def _read_fp8(self, weight: TensorEntry) -> None:
        name = weight.name.removesuffix(WEIGHT_SUFFIX)
        if len(weight.shape) not in (_MATRIX_AXES, _STACKED_AXES):
            problem = f"has shape {weight.shape}; a weight has 2 or 3 axes"
            raise CheckpointError(weight.path, problem, tensor=weight.name)
        if 0 in weight.shape:
            problem = f"has shape {weight.shape}, no values at all; save or download it again"
            raise CheckpointError(weight.path, problem, tensor=weight.name)
        scale = self._scale_of(weight)
        if name in self._scheme.tables or name.rpartition(".")[2] in TABLES:
            self._add_foreign(weight, scale, SchemeKind.TABLE, "an FP8 embedding table")
            return
        scale_format = SCALE_DTYPES.get(scale.dtype)
        if scale_format is None:
            problem = f"is {scale.dtype}; scales are {', '.join(SCALE_DTYPES)}: store it as float32"
            raise CheckpointError(scale.path, problem, tensor=scale.name)
        declared, block = self._targets.declared(name)
        grid = None if block is None else _grid(weight.shape, block)
        if block is not None and grid is not None and _has_grid(scale.shape, grid):
            self.skipped_by[name] = self._skips.skipped_by(name)
            fmt = BlockFormat(E4M3FN, scale_format, block)
            if scale.shape != grid:
                scale = replace(scale, shape=grid)
            shared = scale.name not in scale_names(weight.name)
            self._quantized.append(QuantizedLayer(name, weight, scale, fmt, shared))
            return
        kind = _kind_of_shapes(weight.shape, scale.shape)
        if kind is None:
            raise _shape_error(weight, scale, grid, block, self._declares(declared))
        self._add_foreign(weight, scale, kind, _SHAPE_DETAILS[kind])

    def _read_packed(self, weight: TensorEntry) -> None:
        found = stored_scales(weight.name, self._checkpoint.tensors)
        if not found:
            return
        scale = found[0]
        values = _values_in_a_row(weight, SchemeKind.FP4)
        block = _FP4_BLOCKS.get(scale.dtype)
        if block is not None and scale.shape[-1:] == (-(-values // block),):
            detail = f"packed FP4 ({weight.dtype}, 1x{block} blocks, {scale.dtype} scales)"
            self._add_foreign(weight, scale, SchemeKind.FP4, detail)
        elif weight.dtype == "I8":
            self._add_foreign(
                weight, scale, SchemeKind.INT8, "INT8 (I8)" + self._hint_of_bytes(weight, scale)
            )
        else:
            detail = f"packed in {weight.dtype} with {scale.dtype} scales"
            detail += self._hint_of_bytes(weight, scale)
            self._add_foreign(weight, scale, SchemeKind.OTHER, detail)

    def _hint_of_bytes(self, weight: TensorEntry, scale: TensorEntry) -> str:
        """What to try if the scales are those of the block FP8 that is declared."""
        _, block = self._targets.declared(weight.name.removesuffix(WEIGHT_SUFFIX))
        if block is None or not _has_grid(scale.shape, _grid(weight.shape, block)):
            return ""
        return " (if it is FP8 saved as bytes, view it as float8_e4m3fn and save it again)"

    def _read_float(self, entry: TensorEntry) -> None:
        name = entry.name.removesuffix(WEIGHT_SUFFIX)
        self.skipped_by[name] = self._skips.skipped_by(name)
        if self._scheme.kind is SchemeKind.NONE:
            reason = f"{entry.dtype}: the checkpoint is not quantized"
        elif self.skipped_by[name]:
            reason = f"{entry.dtype}: on the checkpoint's skip list"
        else:
            reason = f"{entry.dtype}: has no scale on disk"
        self._floats.append(SkippedLayer(name, reason))

    def _add_foreign(
        self, weight: TensorEntry, scale: TensorEntry | None, kind: SchemeKind, detail: str
    ) -> None:
        name = weight.name.removesuffix(PACKED_SUFFIX).removesuffix(WEIGHT_SUFFIX)
        if scale is not None:
            self.used.add(scale.name)
        self._foreign.append(ForeignLayer(name, kind, detail, weight, scale))

    def _declares(self, declared: SchemeKind) -> str:
        """What the declaration says instead of a block size, and what to add to it."""
        source = self._scheme.source
        if source is None:
            says = "no config.json beside it declares a quantization"
        else:
            says = f"{source.name} says {declared.value!r} and no block size"
        missing = _BLOCK_SIZE_KEYS.get(
            self._scheme.method or "", "quantization_config with quant_method and weight_block_size"
        )
        return f"{says}; block sizes are never guessed from shapes: add {missing}"

    def _scale_of(self, weight: TensorEntry) -> TensorEntry:
        found = stored_scales(weight.name, self._checkpoint.tensors)
        self.used.update(scale.name for scale in found)
        if len(found) != 1:
            problem = (
                f"has two scales, {found[0].name} and {found[1].name}; remove the one that is not "
                "its own"
                if found
                else f"is FP8 but has no scale: neither {scale_names(weight.name)[0]} nor another "
                "name of it is there; a file is incomplete, download or convert it again"
            )
            raise CheckpointError(weight.path, problem, tensor=weight.name)
        return found[0]


def _values_in_a_row(weight: TensorEntry, kind: SchemeKind) -> int:
    columns = weight.shape[-1] if weight.shape else 1
    return 2 * columns if kind is SchemeKind.FP4 and weight.dtype != "F4" else columns


def _has_grid(shape: tuple[int, ...], grid: tuple[int, ...]) -> bool:
    """Whether a scale tensor is the grid of blocks, as it is or as ModelOpt writes it."""
    *leading, rows, columns = grid
    return shape in (grid, (*leading, rows, 1, columns, 1))


def _kind_of_shapes(weight: tuple[int, ...], scale: tuple[int, ...]) -> SchemeKind | None:
    """Per tensor or per channel, if the scales can be nothing else."""
    *leading, n, _ = weight
    ones = (1,) * len(weight)
    if scale in ((), (1,), ones, (*leading,), (*leading, 1), (*leading, 1, 1)):
        return SchemeKind.PER_TENSOR_FP8
    if scale in ((*leading, n), (*leading, n, 1)):
        return SchemeKind.PER_CHANNEL_FP8
    return None


_SHAPE_DETAILS = {
    SchemeKind.PER_TENSOR_FP8: "per-tensor FP8 (one scale for the matrix)",
    SchemeKind.PER_CHANNEL_FP8: "per-channel FP8 (one scale a row)",
}


def _shape_error(
    weight: TensorEntry,
    scale: TensorEntry,
    grid: tuple[int, ...] | None,
    block: BlockShape | None,
    declares: str,
) -> CheckpointError:
    if grid is None:
        return CheckpointError(
            weight.path,
            f"is FP8 with scales of shape {scale.shape}, but {declares}",
            tensor=weight.name,
        )
    return CheckpointError(
        scale.path,
        f"has shape {scale.shape}, but {weight.name} of shape {weight.shape} in {block} blocks "
        f"needs {grid}{_likely_cause(weight, scale, grid)}",
        tensor=scale.name,
    )


# Where the block size is declared, by ``Scheme.method``.
_BLOCK_SIZE_KEYS = {
    "compressed-tensors": "strategy 'block' and block_structure to its config_groups",
    "modelopt": "a quant_algo with blocks (FP8_PB_WO, MXFP8)",
}


def _likely_cause(weight: TensorEntry, scale: TensorEntry, grid: tuple[int, ...]) -> str:
    """What the scales would fit, for the person who repairs the file; nothing is read that way."""
    *leading, rows, columns = grid
    if scale.shape == (*leading, columns, rows):
        return "; it is transposed: save it with a row for each row of blocks"
    usual = [one for one in _USUAL_BLOCKS if _has_grid(scale.shape, _grid(weight.shape, one))]
    if usual:
        return f"; it would fit {usual[0]} blocks: is weight_block_size the checkpoint's own?"
    return "; weight and scale are of different checkpoints, or weight_block_size is wrong"


def _grid(shape: tuple[int, ...], block: BlockShape) -> tuple[int, ...]:
    return (*shape[:-2], *block.grid(*shape[-2:]))


def _is_float_linear(entry: TensorEntry) -> bool:
    return (
        entry.dtype in FLOAT_DTYPES
        and len(entry.shape) == _MATRIX_AXES
        and entry.name.endswith(WEIGHT_SUFFIX)
    )
