"""What a backend is: one pure question, one preparation, one hot call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias

from blockscale.planning.decision import PlannableBackend

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from blockscale.kernels.step import Steps
    from blockscale.planning.decision import Offer
    from blockscale.tensor import BlockScaledTensor


# What ``Backend.bind`` returns: (activation, out, bias) -> None, writing the product into ``out``.
# Which of the two it is follows from ``offer.activation``.
MultiplyFloat: TypeAlias = "Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], None]"
MultiplyQuantized: TypeAlias = (
    "Callable[[BlockScaledTensor, torch.Tensor, torch.Tensor | None], None]"
)
Multiply: TypeAlias = "MultiplyFloat | MultiplyQuantized"

# What ``ContiguousBackend.bind_contiguous`` returns: (activation, groups, out) -> None.
ContiguousFloat: TypeAlias = "Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]"
ContiguousQuantized: TypeAlias = "Callable[[BlockScaledTensor, torch.Tensor, torch.Tensor], None]"
MultiplyContiguous: TypeAlias = "ContiguousFloat | ContiguousQuantized"

# What ``MaskedBackend.bind_masked`` returns: (activation, counts, out, expected_rows) -> None.
MaskedFloat: TypeAlias = "Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], None]"
MaskedQuantized: TypeAlias = "Callable[[BlockScaledTensor, torch.Tensor, torch.Tensor, int], None]"
MultiplyMasked: TypeAlias = "MaskedFloat | MaskedQuantized"


class Backend(PlannableBackend, Protocol):
    """A provider that planning may choose and modules may run. Stateless.

    Offers whose ``readiness`` is PLAN_ONLY come from backends that only implement
    ``PlannableBackend``.
    """

    def prepare(self, weight: BlockScaledTensor, offer: Offer) -> BlockScaledTensor:
        """The weight in exactly the form of ``offer.weight``; the argument is not written to.

        ``weight`` is in ``offer.weight.format`` already (the planner's conversion is done by
        ``modules.prepare``); this changes the scale layout and builds what the kernel needs, such
        as compiled code, so that the first forward does neither.

        Raises BackendError if the provider cannot be loaded.
        """
        ...

    def quantize_activation(self, activation: torch.Tensor, offer: Offer) -> BlockScaledTensor:
        """An (M, k) float matrix quantized into exactly the form of ``offer.activation``.

        Never called if ``offer.activation`` is None.
        """
        ...

    def bind(self, weight: BlockScaledTensor, offer: Offer) -> Multiply:
        """The hot call for a prepared weight: whatever can be looked up once is looked up here.

        The result writes activation x weight^T (+ bias) into ``out``, a contiguous (M, n) matrix
        with M >= 1. Its activation is in the form of ``offer.activation``, or a float (M, k)
        matrix with stride 1 along k where that is None. It reads the weight's storages, so that
        new values written into them are served. It decides nothing: no branch on device,
        environment or dtype.
        """
        ...


class StepBackend(Backend, Protocol):
    """A backend that quantizes and multiplies in one call of its own, with less host code."""

    def bind_steps(
        self, weight: BlockScaledTensor, offer: Offer, dtypes: tuple[torch.dtype, torch.dtype]
    ) -> Steps:
        """What ``quantize_activation`` and ``bind`` do, bit for bit, for each token count.

        ``dtypes``: of the activation and of the result. What follows from a token count is computed
        when its step is asked for; a step decides nothing, as ``bind``.
        """
        ...


class ContiguousBackend(Backend, Protocol):
    """A backend that multiplies the rows of all experts in one call, expert after expert.

    Needed where an offer lists ``Arrangement.CONTIGUOUS``. ``prepare`` then gets a weight with one
    leading axis, (experts, n, k).
    """

    def bind_contiguous(self, weight: BlockScaledTensor, offer: Offer) -> MultiplyContiguous:
        """The hot call for a prepared (experts, n, k) weight: each row block times one expert.

        The result takes

        - ``activation``: (rows, k), in the form of ``offer.activation``, or float with stride 1
          along k where that is None. rows = blocks x alignment, the alignment being the one that
          the offer lists for this number of tokens. rows may be 0.
        - ``groups``: (blocks,) int32, contiguous, on the weight's device: the expert of each row
          block, in [0, experts), or -1. Experts ascend; all -1 come last.
        - ``out``: (rows, n), contiguous.

        Row r of ``out`` becomes row r of ``activation`` x weight[groups[r // alignment]]^T. Blocks
        of -1, and the padding rows that end an expert's last block, hold any bits, NaN too: what
        becomes of them in ``out`` is unspecified, and they change no other row. On a GPU the host
        never learns the contents of ``groups``, so a CUDA graph that was captured for some rows
        serves every routing of as many. It decides nothing else, as ``bind``.
        """
        ...


class MaskedBackend(Backend, Protocol):
    """A backend that multiplies one slot of rows for each expert, of which the first few count.

    Needed where an offer lists ``Arrangement.MASKED``.
    """

    def bind_masked(self, weight: BlockScaledTensor, offer: Offer) -> MultiplyMasked:
        """The hot call for a prepared (experts, n, k) weight: each slot times its expert.

        The result takes

        - ``activation``: (experts, slot, k), in the form of ``offer.activation`` with one leading
          axis, or float, contiguous, where that is None. The slot is a multiple of the alignment
          that the offer lists, at least one of it.
        - ``counts``: (experts,) int32, contiguous, on the weight's device, each in [0, slot].
        - ``out``: (experts, slot, n), contiguous.
        - ``expected_rows``: what a count is likely to be, known to the host: a hint for the choice
          of tiles, never for what is computed.

        The first counts[e] rows of ``out[e]`` become those of ``activation[e]`` x weight[e]^T. The
        other rows of a slot are any bits on the way in and unspecified on the way out; no store
        reaches another slot's rows that count. As for graphs and decisions: ``bind_contiguous``.
        """
        ...
