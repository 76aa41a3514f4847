"""RowBank: the trained neurons of one layer, and the only place where trained weights live."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from . import _C, ops
from .bank_rows import (
    BANK_MODES,
    KEPT_BY_MODE,
    MASTER_DTYPES,
    ROWS_PER_NEURON,
    Rows,
    check_neurons,
    neurons_at,
    overlay_rows,
    positions_of,
    store_rows,
)
from .devices import resolve_device, send

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .checkpoint_source import ModelSource
    from .experts import PagedLayer
    from .store import ExpertStore

PLACEMENTS = ("device", "host")
ROUNDINGS = ("stochastic", "nearest")
GRAD_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class RowBank:
    """Codes, scales and gradient of one layer's trained neurons, and what is kept beside the codes.

    Neuron i owns three rows of length hidden_size: gate, up and down^T. The model always computes through the codes.
    Beside them, mode "master" keeps a bf16 or fp32 copy of the rows and "residual" the rounding error in a byte a
    weight, so that small steps are not lost (export writes what both stand for); "eco" and "in_place" keep nothing. The
    update of each mode: ops.masked_adam_.

    Placement "host" keeps what only the optimizer needs in host memory: master or residual, the moments, and copies of
    codes and scales; the update runs on the CPU, `grad` crosses to it and the new codes come back (`publish`; from a
    GPU and back: usaf_ext.host_updates).

    Attributes (n neurons, E experts, H hidden_size; on `device` unless said otherwise):
        layer: MoE layer number. format: one of `_C.FORMATS`. mode: one of BANK_MODES.
        rounding: "stochastic" or "nearest", of modes "in_place" and "eco". placement: "device" or "host".
        neuron_expert, neuron_index: int32 [n], sorted by (expert, neuron).
        overlay_rows: on a GPU int64 [n, 3], see bank_rows.overlay_rows; on the CPU None.
        codes: uint8 [n, 3, code_bytes]. absmax: ops.scale_dtype(format) [n, 3, num_blocks].
        state_codes, state_absmax: what the optimizer updates: codes and absmax themselves or, of a trainable bank in
            placement "host", their copies in host memory.
        master: [n, 3, H], bfloat16 or float32, residual: int8 [n, 3, H], where the placement says; or None.
        grad: float32 or bfloat16 [n, 3, H] that the expert layer's backward adds to; None: the bank is not trainable.
        expert_hit: uint8 [E] on the CPU; backward sets 1 where an expert's gradients were added.
        grad_squares: float64, sums of squares of grad, kept by backward: [E], of each expert's rows; on a GPU [n, 3].
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
        master: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        device: torch.device | str = "cpu",
        trainable: bool = True,
        rounding: str = "stochastic",
        grad_dtype: torch.dtype = torch.float32,
        placement: str = "device",
        grad_buffer: torch.Tensor | None = None,
    ) -> None:
        """Take the rows as given; tensors are copied only where they must move or become contiguous.

        grad_buffer: zeros of grad_dtype, one-dimensional, at least n * 3 * H: use its beginning as the gradient (see
        `share_gradients`). Raises TypeError or ValueError for a wrong dtype, shape, format, mode or index.
        """
        if format not in _C.FORMATS:
            raise ValueError(f"format must be one of {tuple(_C.FORMATS)}, got {format!r}")
        check_options(mode=mode, rounding=rounding, grad_dtype=grad_dtype, placement=placement)
        for name, kept in (("master", master), ("residual", residual)):
            if (kept is None) == (KEPT_BY_MODE[mode] == name):
                raise ValueError(f"mode {mode!r} {'needs' if kept is None else 'has no'} {name}")
        check_neurons(neuron_expert, neuron_index, num_experts, intermediate_size)
        n = len(neuron_expert)
        expected: list[tuple[str, torch.Tensor, tuple[torch.dtype, ...], tuple[int, ...]]] = [
            ("codes", codes, (torch.uint8,), (n, ROWS_PER_NEURON, _C.code_bytes(format, hidden_size))),
            ("absmax", absmax, (ops.scale_dtype(format),), (n, ROWS_PER_NEURON, _C.num_blocks(format, hidden_size))),
        ]
        if master is not None:
            expected.append(("master", master, tuple(MASTER_DTYPES.values()), (n, ROWS_PER_NEURON, hidden_size)))
        if residual is not None:
            expected.append(("residual", residual, (torch.int8,), (n, ROWS_PER_NEURON, hidden_size)))
        for name, tensor, dtypes, shape in expected:
            if tensor.dtype not in dtypes:
                raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")

        self.layer, self.format, self.mode = layer, format, mode
        self.num_experts, self.hidden_size, self.intermediate_size = num_experts, hidden_size, intermediate_size
        self.rounding, self.placement, self.grad_dtype = rounding, placement, grad_dtype
        device = self.device = resolve_device(device)
        self.positions = positions_of(neuron_expert, neuron_index, intermediate_size).cpu()
        self.neuron_expert = neuron_expert.to(device).contiguous()
        self.neuron_index = neuron_index.to(device).contiguous()
        on_gpu = device.type != "cpu"
        self.overlay_rows = overlay_rows(self.neuron_index, intermediate_size) if on_gpu else None
        self.codes = codes.to(device).contiguous()
        self.absmax = absmax.to(device).contiguous()
        in_host = placement == "host"
        self.state_codes, self.state_absmax = self.codes, self.absmax
        if in_host and trainable:
            self.state_codes, self.state_absmax = (_host_copy(tensor) for tensor in (codes, absmax))
        self.master, self.residual = (
            None if kept is None else _host_copy(kept) if in_host else kept.to(device).contiguous()
            for kept in (master, residual)
        )
        self.expert_hit = torch.zeros(num_experts, dtype=torch.uint8)
        squares = (n, ROWS_PER_NEURON) if on_gpu else (num_experts,)
        self.grad_squares = torch.zeros(squares, dtype=torch.float64, device=device)
        self.grad: torch.Tensor | None = None
        self.grad_buffer: torch.Tensor | None = None
        if trainable and grad_buffer is None:
            self.grad = torch.zeros(n, ROWS_PER_NEURON, hidden_size, dtype=grad_dtype, device=device)
        if grad_buffer is not None:
            self.use_gradient_buffer(grad_buffer)
        else:
            self.native = self._native()

    def _native(self) -> _C.RowBank:
        neuron_expert, neuron_index = neurons_at(self.positions, self.intermediate_size)
        return _C.RowBank(
            self.format,
            self.num_experts,
            self.hidden_size,
            self.intermediate_size,
            neuron_expert.tolist(),
            neuron_index.tolist(),
            self.codes.data_ptr(),
            self.absmax.data_ptr(),
            self.grad.data_ptr() if self.grad is not None else 0,
            str(self.grad_dtype).removeprefix("torch."),
            self.neuron_expert.data_ptr(),
            self.neuron_index.data_ptr(),
            self.expert_hit.data_ptr(),
            self.grad_squares.data_ptr(),
            0 if self.overlay_rows is None else self.overlay_rows.data_ptr(),
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
        **options: Any,
    ) -> RowBank:
        """Copy the rows of `neurons` = (neuron_expert, neuron_index), int32 [n] each, out of `store`.

        Masters and residuals start from `originals`, the checkpoint that `store` was made of; without it from the
        decoded codes, and a warning is logged. options: device, rounding, grad_dtype, placement, as the constructor's.
        Raises StoreError when the fingerprint of `originals` is not the store's.
        """
        rows = store_rows(store, layer, neurons, originals=originals, mode=mode, master_dtype=master_dtype)
        return cls(
            layer=layer,
            format=store.format,
            mode=mode,
            num_experts=store.num_experts,
            hidden_size=store.hidden_size,
            intermediate_size=store.intermediate_size,
            neuron_expert=neurons[0],
            neuron_index=neurons[1],
            codes=rows["codes"],
            absmax=rows["absmax"],
            master=rows.get("master"),
            residual=rows.get("residual"),
            **options,
        )

    def like(
        self,
        layer: int,
        positions: torch.Tensor,
        rows: Rows,
        *,
        trainable: bool = True,
        grad_buffer: torch.Tensor | None = None,
    ) -> RowBank:
        """A bank of this one's kind for other neurons (`positions`, ascending) of `layer`, made of `rows`."""
        neuron_expert, neuron_index = neurons_at(positions, self.intermediate_size)
        return RowBank(
            layer=layer,
            format=self.format,
            mode=self.mode,
            num_experts=self.num_experts,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            neuron_expert=neuron_expert,
            neuron_index=neuron_index,
            codes=rows["codes"],
            absmax=rows["absmax"],
            master=rows.get("master"),
            residual=rows.get("residual"),
            device=self.device,
            trainable=trainable,
            rounding=self.rounding,
            grad_dtype=self.grad_dtype,
            placement=self.placement,
            grad_buffer=grad_buffer,
        )

    @property
    def num_neurons(self) -> int:
        return len(self.positions)

    @property
    def num_parameters(self) -> int:
        """Trained weights: 3 * hidden_size a neuron."""
        return self.num_neurons * ROWS_PER_NEURON * self.hidden_size

    @property
    def num_candidates(self) -> int:
        """Weights that could be trained: all of the layer's experts."""
        return self.num_experts * self.intermediate_size * ROWS_PER_NEURON * self.hidden_size

    @property
    def state_device(self) -> torch.device:
        """Where the optimizer's update runs."""
        return torch.device("cpu") if self.placement == "host" else self.device

    @property
    def rows(self) -> Rows:
        """What was learnt and nothing else: codes, absmax and what the mode keeps; where the update runs."""
        rows = {"codes": self.state_codes, "absmax": self.state_absmax}
        kept = {"master": self.master, "residual": self.residual}
        return rows | {name: tensor for name, tensor in kept.items() if tensor is not None}

    @property
    def device_bytes(self) -> int:
        """Bytes of the tensors on `device`, without a gradient buffer that is shared."""
        held = [self.neuron_expert, self.neuron_index, self.codes, self.absmax]
        if self.overlay_rows is not None:
            held += [self.overlay_rows, self.grad_squares]
        if self.grad is not None and self.grad_buffer is None:
            held.append(self.grad)
        if self.placement == "device":
            held += [kept for kept in (self.master, self.residual) if kept is not None]
        return sum(tensor.nbytes for tensor in held)

    @property
    def host_bytes(self) -> int:
        """Bytes of the tensors in host memory, whatever the device is."""
        held = [self.positions, self.expert_hit]
        if self.device.type == "cpu":
            held.append(self.grad_squares)
        if self.placement == "host":
            held += [tensor for tensor in self.rows.values() if tensor is not self.codes and tensor is not self.absmax]
        return sum(tensor.nbytes for tensor in held)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held (the optimizer's moments are its own)."""
        return self.device_bytes + self.host_bytes

    def decode(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weights the model computes with: decoded codes, [n, 3, H] in `dtype` (float32, bfloat16 or float16)."""
        return ops.dequantize_blocks(self.codes, self.absmax, self.hidden_size, self.format, dtype=dtype)

    def trained_rows(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weights that were learnt, [n, 3, H]: the master, codes and residual together, or the decoded codes."""
        if self.residual is not None:
            codes, absmax = (tensor.to(self.residual.device) for tensor in (self.state_codes, self.state_absmax))
            return ops.dequantize_residual(codes, absmax, self.residual, self.format).to(dtype)
        return self.master.to(dtype) if self.master is not None else self.decode(dtype)

    def publish(self) -> None:
        """Copy updated codes and scales from host memory to the device; nothing to do in placement "device"."""
        if self.state_codes is not self.codes:
            self.codes.copy_(self.state_codes)
            self.absmax.copy_(self.state_absmax)

    def active_rows(self) -> torch.Tensor:
        """bool [n, 3], where the update runs: rows of experts that got gradients since zero_grad. No host wait."""
        hit = send(self.expert_hit.bool(), self.state_device)
        experts = self.neuron_expert if self.state_device == self.device else self.positions // self.intermediate_size
        return hit[experts.long()][:, None].expand(-1, ROWS_PER_NEURON).contiguous()

    def zero_grad(self) -> None:
        """Clear the gradient, its sums of squares and the record of experts that got one."""
        if self.grad is not None:
            self.grad.zero_()
        self.expert_hit.zero_()
        self.grad_squares.zero_()

    def grad_norm(self) -> torch.Tensor:
        """The Euclidean norm of `grad`, float64, 0-dim on `device`, from the sums that backward keeps. No host wait."""
        return self.grad_squares.sum().sqrt()

    def use_gradient_buffer(self, buffer: torch.Tensor) -> None:
        """Keep the gradient at the beginning of `buffer` (cleared); a layer that holds this bank must be set again.

        Raises TypeError or ValueError unless it is one-dimensional, of grad_dtype and long enough.
        """
        if buffer.dtype != self.grad_dtype:
            raise TypeError(f"grad_buffer must be {self.grad_dtype}, got {buffer.dtype}")
        if buffer.dim() != 1 or len(buffer) < self.num_parameters:
            raise ValueError(f"grad_buffer must be [>= {self.num_parameters}], got {tuple(buffer.shape)}")
        self.grad_buffer = buffer
        self.grad = buffer[: self.num_parameters].view(self.num_neurons, ROWS_PER_NEURON, self.hidden_size)
        self.zero_grad()
        self.native = self._native()


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    # Pageable even beside a GPU: what crosses does so through pinned buffers (host_updates), and pinned memory comes in
    # powers of two.
    return tensor.detach().to("cpu", copy=True).contiguous()


def check_options(*, mode: str, rounding: str, grad_dtype: torch.dtype, placement: str) -> None:
    """Raise ValueError naming the first setting that RowBank does not know."""
    for name, value, allowed in (
        ("mode", mode, BANK_MODES),
        ("rounding", rounding, ROUNDINGS),
        ("grad_dtype", grad_dtype, tuple(GRAD_DTYPES.values())),
        ("placement", placement, PLACEMENTS),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def share_gradients(layers: Iterable[PagedLayer]) -> None:
    """Let the trainable banks of `layers` keep their gradients in one buffer, as large as the largest of them.

    For gradient release: each bank's gradient must be used up (`MaskedAdam.step_layer`, which clears it) before the
    backward of another layer writes to the buffer. The banks must be in place, and their gradients are cleared.
    Raises ValueError when no layer has a trainable bank, or their gradients differ in dtype.
    """
    trained = [(layer, layer.bank) for layer in layers if layer.bank is not None and layer.bank.grad is not None]
    if not trained:
        raise ValueError("layers: none has a trainable bank")
    if len({bank.grad_dtype for _, bank in trained}) > 1:
        raise ValueError("layers: their banks' gradients differ in dtype")
    like = trained[0][1]
    size = max(bank.num_parameters for _, bank in trained)
    buffer = torch.zeros(size, dtype=like.grad_dtype, device=like.device)
    for layer, bank in trained:
        bank.use_gradient_buffer(buffer)
        layer.set_bank(bank)
