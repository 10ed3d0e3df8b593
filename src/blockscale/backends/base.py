"""What a backend is: one pure question, one preparation, one hot call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias

from blockscale.planning.decision import PlannableBackend

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from blockscale.planning.decision import Offer
    from blockscale.tensor import BlockScaledTensor


# What ``Backend.bind`` returns: (activation, out, bias) -> None, writing the product into ``out``.
# Which of the two it is follows from ``offer.activation``.
MultiplyFloat: TypeAlias = "Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], None]"
MultiplyQuantized: TypeAlias = (
    "Callable[[BlockScaledTensor, torch.Tensor, torch.Tensor | None], None]"
)
Multiply: TypeAlias = "MultiplyFloat | MultiplyQuantized"


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
