"""RowBank: the trained neurons of one layer, and the only place where trained weights live."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from . import _C, ops
from .errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .checkpoint_source import ModelSource
    from .experts import PagedLayer
    from .store import ExpertStore

logger = logging.getLogger(__name__)

ROWS_PER_NEURON = 3  # gate, up, down^T
BANK_MODES = ("master", "in_place")
MASTER_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def check_neurons(
    neuron_expert: torch.Tensor, neuron_index: torch.Tensor, num_experts: int, intermediate_size: int
) -> None:
    """Raise TypeError or ValueError unless the two int32 [n] tensors are sorted, distinct, in range and n >= 1."""
    for name, tensor in (("neuron_expert", neuron_expert), ("neuron_index", neuron_index)):
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.int32:
            found = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be an int32 tensor, got {found}")
        if tensor.dim() != 1:
            raise ValueError(f"{name} must have one dimension, got shape {tuple(tensor.shape)}")
    if neuron_expert.shape != neuron_index.shape:
        raise ValueError(
            f"neuron_expert and neuron_index must have one length, got {len(neuron_expert)} and {len(neuron_index)}"
        )
    if len(neuron_expert) == 0:
        raise ValueError("neuron_expert is empty: a bank needs at least one neuron")
    for name, tensor, bound in (
        ("neuron_expert", neuron_expert, num_experts),
        ("neuron_index", neuron_index, intermediate_size),
    ):
        low, high = int(tensor.min()), int(tensor.max())
        if low < 0 or high >= bound:
            raise ValueError(f"{name} must lie in [0, {bound}), got {low} .. {high}")
    position = neuron_expert.long() * intermediate_size + neuron_index.long()
    if not bool((position[1:] > position[:-1]).all()):
        raise ValueError("neurons must be sorted by (expert, neuron) and distinct")


class RowBank:
    """Codes, scales, master and gradient of one layer's trained neurons.

    Neuron i owns three rows of length hidden_size: gate, up and down^T. The model always computes through the codes;
    in mode "master" a bf16 or fp32 copy of the rows beside them keeps the small steps (and is what export writes), in
    mode "in_place" there is nothing beside them.

    Attributes (n neurons, E experts, H hidden_size; on `device` unless said otherwise):
        layer: MoE layer number. format: one of `_C.FORMATS`. mode: "master" or "in_place".
        neuron_expert, neuron_index: int32 [n], sorted by (expert, neuron).
        codes: uint8 [n, 3, code_bytes]. absmax: ops.scale_dtype(format) [n, 3, num_blocks].
        master: [n, 3, H], bfloat16 or float32, or None.
        grad: float32 [n, 3, H] that the expert layer's backward adds to; None when the bank is not trainable.
        expert_hit: uint8 [E] on the CPU; backward sets 1 where an expert's gradients were added.
        grad_squares: float64 [E] on the CPU: the sum of squares of each expert's rows of grad, kept by backward.
        native: the C++ view of these tensors.
    """

    def __init__(
        self,
        *,
        layer: int,
        format: str,
        mode: str,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        neuron_expert: torch.Tensor,
        neuron_index: torch.Tensor,
        codes: torch.Tensor,
        absmax: torch.Tensor,
        master: torch.Tensor | None,
        device: torch.device | str = "cpu",
        trainable: bool = True,
    ) -> None:
        """Take the rows as given; tensors are copied only where they must move or become contiguous.

        Raises TypeError or ValueError for a wrong dtype, shape, format, mode or index.
        """
        if mode not in BANK_MODES:
            raise ValueError(f"mode must be one of {BANK_MODES}, got {mode!r}")
        if format not in _C.FORMATS:
            raise ValueError(f"format must be one of {tuple(_C.FORMATS)}, got {format!r}")
        if (master is None) != (mode == "in_place"):
            raise ValueError(f"mode {mode!r} {'needs' if mode == 'master' else 'has no'} master")
        check_neurons(neuron_expert, neuron_index, num_experts, intermediate_size)
        n = len(neuron_expert)
        expected: list[tuple[str, torch.Tensor, tuple[torch.dtype, ...], tuple[int, ...]]] = [
            ("codes", codes, (torch.uint8,), (n, ROWS_PER_NEURON, _C.code_bytes(format, hidden_size))),
            ("absmax", absmax, (ops.scale_dtype(format),), (n, ROWS_PER_NEURON, _C.num_blocks(format, hidden_size))),
        ]
        if master is not None:
            expected.append(("master", master, tuple(MASTER_DTYPES.values()), (n, ROWS_PER_NEURON, hidden_size)))
        for name, tensor, dtypes, shape in expected:
            if tensor.dtype not in dtypes:
                raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")

        self.layer, self.format, self.mode = layer, format, mode
        self.num_experts, self.hidden_size, self.intermediate_size = num_experts, hidden_size, intermediate_size
        self.neuron_expert = neuron_expert.to(device).contiguous()
        self.neuron_index = neuron_index.to(device).contiguous()
        self.codes = codes.to(device).contiguous()
        self.absmax = absmax.to(device).contiguous()
        self.master = None if master is None else master.to(device).contiguous()
        self.grad = (
            torch.zeros(n, ROWS_PER_NEURON, hidden_size, dtype=torch.float32, device=device) if trainable else None
        )
        self.expert_hit = torch.zeros(num_experts, dtype=torch.uint8)
        self.grad_squares = torch.zeros(num_experts, dtype=torch.float64)
        self._host_index = neuron_expert.tolist(), neuron_index.tolist()
        self.native = self._native()

    def _native(self) -> _C.RowBank:
        return _C.RowBank(
            self.format,
            self.num_experts,
            self.hidden_size,
            self.intermediate_size,
            *self._host_index,
            self.codes.data_ptr(),
            self.absmax.data_ptr(),
            self.grad.data_ptr() if self.grad is not None else 0,
            str(torch.float32 if self.grad is None else self.grad.dtype).removeprefix("torch."),
            self.neuron_expert.data_ptr(),
            self.neuron_index.data_ptr(),
            self.expert_hit.data_ptr(),
            self.grad_squares.data_ptr(),
        )

    @classmethod
    def from_store(
        cls,
        store: ExpertStore,
        layer: int,
        neurons: tuple[torch.Tensor, torch.Tensor],
        *,
        originals: ModelSource | None = None,
        mode: str = "master",
        master_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> RowBank:
        """Copy the rows of `neurons` = (neuron_expert, neuron_index), int32 [n] each, out of `store`.

        Masters come from `originals`, the checkpoint that `store` was made of; without it they are the decoded codes,
        and a warning is logged. Raises StoreError when the fingerprint of `originals` is not the store's.
        """
        if not 0 <= layer < store.num_layers:
            raise ValueError(f"layer must lie in [0, {store.num_layers}), got {layer}")
        if mode not in BANK_MODES:
            raise ValueError(f"mode must be one of {BANK_MODES}, got {mode!r}")
        if master_dtype not in MASTER_DTYPES.values():
            raise ValueError(f"master_dtype must be torch.bfloat16 or torch.float32, got {master_dtype}")
        if originals is not None and originals.fingerprint != store.fingerprint:
            raise StoreError(
                f"originals at {originals.path} are not the checkpoint this store was made of "
                f"(fingerprint {originals.fingerprint}, the store's is {store.fingerprint})"
            )
        neuron_expert, neuron_index = neurons
        check_neurons(neuron_expert, neuron_index, store.num_experts, store.intermediate_size)

        codes, absmax, original_rows = [], [], []
        experts, counts = torch.unique_consecutive(neuron_expert, return_counts=True)
        for expert, selected in zip(experts.tolist(), neuron_index.long().cpu().split(counts.tolist())):
            expert_codes, expert_absmax = store.rows(layer, expert, selected)
            codes.append(expert_codes)
            absmax.append(expert_absmax)
            if originals is not None and mode == "master":
                original_rows.append(originals.neurons(layer, expert, selected).to(master_dtype))
        all_codes, all_absmax = torch.cat(codes), torch.cat(absmax)
        master = None
        if mode == "master":
            if originals is not None:
                master = torch.cat(original_rows)
            else:
                logger.warning(
                    "layer %d: no original weights given; the masters start from the decoded %s codes",
                    layer,
                    store.format,
                )
                master = ops.dequantize_blocks(
                    all_codes, all_absmax, store.hidden_size, store.format, dtype=torch.float32
                ).to(master_dtype)
        return cls(
            layer=layer,
            format=store.format,
            mode=mode,
            num_experts=store.num_experts,
            hidden_size=store.hidden_size,
            intermediate_size=store.intermediate_size,
            neuron_expert=neuron_expert,
            neuron_index=neuron_index,
            codes=all_codes,
            absmax=all_absmax,
            master=master,
            device=device,
        )

    @property
    def num_neurons(self) -> int:
        return len(self.neuron_expert)

    @property
    def num_parameters(self) -> int:
        """Trained weights: 3 * hidden_size a neuron."""
        return self.num_neurons * ROWS_PER_NEURON * self.hidden_size

    @property
    def num_candidates(self) -> int:
        """Weights that could be trained: all of the layer's experts."""
        return self.num_experts * self.intermediate_size * ROWS_PER_NEURON * self.hidden_size

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held (the optimizer's moments are its own)."""
        held = (
            self.neuron_expert,
            self.neuron_index,
            self.codes,
            self.absmax,
            self.master,
            self.grad,
            self.expert_hit,
            self.grad_squares,
        )
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def decode(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weights the model computes with: decoded codes, [n, 3, H] in `dtype` (float32, bfloat16 or float16)."""
        return ops.dequantize_blocks(self.codes, self.absmax, self.hidden_size, self.format, dtype=dtype)

    def trained_rows(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weights that were learnt: the master, or the decoded codes in mode "in_place"; [n, 3, H]."""
        return self.master.to(dtype) if self.master is not None else self.decode(dtype)

    def zero_grad(self) -> None:
        """Clear the gradient, its sums of squares and the record of experts with tokens."""
        if self.grad is not None:
            self.grad.zero_()
        self.expert_hit.zero_()
        self.grad_squares.zero_()

    def grad_norm(self) -> torch.Tensor:
        """The Euclidean norm of `grad`, float64, 0-dim. Raises ValueError when the bank is not trainable."""
        if self.grad is None:
            raise ValueError(f"the bank of layer {self.layer} is not trainable: it has no gradient")
        return torch.linalg.vector_norm(self.grad, dtype=torch.float64)


def share_gradients(layers: Iterable[PagedLayer]) -> None:
    """Let the trainable banks of `layers` keep their gradients in one buffer, as large as the largest of them.

    For gradient release: each bank's gradient must be used up (`MaskedAdam.step_layer`, which clears it) before the
    backward of another layer writes to the buffer. The banks must be in place, and their gradients are cleared.
    Raises ValueError when no layer has a trainable bank.
    """
    trained = [(layer, layer.bank) for layer in layers if layer.bank is not None and layer.bank.grad is not None]
    if not trained:
        raise ValueError("layers: none has a trainable bank")
    if len({bank.grad.dtype for _, bank in trained if bank.grad is not None}) > 1:
        raise ValueError("layers: their banks' gradients differ in dtype")
    like = max((bank.grad for _, bank in trained if bank.grad is not None), key=torch.Tensor.numel)
    buffer = torch.zeros_like(like).reshape(-1)
    for layer, bank in trained:
        bank.grad = buffer[: bank.num_parameters].view(bank.num_neurons, ROWS_PER_NEURON, bank.hidden_size)
        bank.expert_hit.zero_()
        bank.grad_squares.zero_()
        bank.native = bank._native()
        layer.set_bank(bank)
