"""The expert layer: an MoE layer's experts computed from a paged store, their chosen neurons trained in place."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import _C
from .devices import resolve_device
from .errors import UsafError
from .memory import ExpertMemory
from .store import ExpertStore

if TYPE_CHECKING:
    from .bank import RowBank

ACTIVATIONS = ("silu", "gelu_tanh")
IMPORTANCE_METRICS = ("gradient", "gradient_weight")

_layers: weakref.WeakValueDictionary[int, PagedLayer] = weakref.WeakValueDictionary()  # by handle


@torch.library.register_fake("usaf::experts_forward")
def _(x, index, weights, anchor, handle, training):
    return torch.empty_like(x)


@torch.library.register_fake("usaf::experts_backward")
def _(grad_out, x, index, weights, handle):
    return torch.empty_like(x), torch.empty_like(weights), x.new_empty(1, dtype=torch.float32)


@torch.library.register_fake("usaf::experts_forward_many")
def _(x, index, weights, handle, training):
    return [torch.empty_like(one) for one in x]


@torch.library.register_fake("usaf::experts_backward_many")
def _(grad_out, x, index, weights, handle):
    grad_anchor = x[0].new_empty(1, dtype=torch.float32)
    return [torch.empty_like(one) for one in x], [torch.empty_like(one) for one in weights], grad_anchor


def run_op(op: Callable[..., Any], handle: int, *arguments: Any) -> Any:
    """`op(*arguments)` on the layer with `handle`; what failed in its pager is a StoreError or DeviceError again.

    Torch makes a RuntimeError of every C++ exception that it does not know.
    """
    try:
        return op(*arguments)
    except RuntimeError as error:
        _layers[handle].memory.sweep.rethrow_failure(str(error))
        raise


def _save_inputs(ctx, inputs, output):
    x, index, weights, _anchor, handle, _training = inputs
    ctx.save_for_backward(x, index, weights)
    ctx.handle = handle
    ctx.routed = index  # kept past a checkpoint, which drops what is saved and makes it anew


def _backward(ctx, grad_out):
    x, index, weights = ctx.saved_tensors
    if index is not ctx.routed:
        _layers[ctx.handle].note_route(ctx.routed, index)
    op = torch.ops.usaf.experts_backward
    # By the very index that forward had, the layer knows its tokens per expert and waits for nothing.
    grad_x, grad_weights, grad_anchor = run_op(op, ctx.handle, grad_out, x, ctx.routed, weights, ctx.handle)
    return grad_x, None, grad_weights, grad_anchor, None, None


torch.library.register_autograd("usaf::experts_forward", _backward, setup_context=_save_inputs)


class PagedLayer:
    """The experts of one MoE layer.

    Callable: `layer(hidden [num_tokens, hidden_size], top_k_index [num_tokens, top_k] int64, top_k_weights
    [num_tokens, top_k])` gives `[num_tokens, hidden_size]` in the dtype of `hidden`, which must be the memory's compute
    dtype. An index equal to `num_experts` means "not here". Differentiable in `hidden` and `top_k_weights`; gradients
    of the selected neurons are added to `bank.grad`.

    Several micro-batches in one sweep of the layer's pages: `torch.ops.usaf.experts_forward_many(hidden, top_k_index,
    top_k_weights, layer.native.handle, training)` and `experts_backward_many(grad_out, hidden, top_k_index,
    top_k_weights, layer.native.handle)`, with lists of tensors; the bits of as many single calls in that order. They
    have no autograd formula.

    All tensors lie on the memory's device unless said otherwise.

    Attributes:
        device: where the experts are computed.
        anchor: fp32 Parameter of one element, never updated. It makes autograd run the backward, and its gradient is
            the norm of the gradients accumulated in the bank, so that clipping by a global norm counts them.
        token_counts: int32 [num_experts] on the CPU, tokens per expert of the latest forward (all its micro-batches).
        rerouted: bool, 0-dim: a recompute chose other experts than its forward (see `check_routes`); None: none ran.
        bank: the trained neurons, or None.
        frozen_bank: neurons trained earlier, whose rows the model computes with, or None.
    """

    def __init__(self, memory: ExpertMemory, index: int, activation: str = "silu"):
        store = memory.store
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
        self.memory = memory
        self.device = memory.device
        self.store = store
        self.index = index
        self.name = store.layer_names[index]
        self.num_experts = store.num_experts
        self.hidden_size = store.hidden_size
        self.intermediate_size = store.intermediate_size
        self.activation = activation
        self.anchor = nn.Parameter(torch.zeros(1, dtype=torch.float32, device=memory.device))
        self.token_counts = torch.zeros(self.num_experts, dtype=torch.int32)
        self._bank: RowBank | None = None
        self._frozen_bank: RowBank | None = None
        self._threshold_counts: Tensor | None = None
        self._importance: Tensor | None = None
        dtype = str(memory.dtype).removeprefix("torch.")
        self.native = _C.ExpertLayer(memory.sweep, index, activation, dtype, memory.scratch_pointer)
        self.native.set_token_counts(self.token_counts.data_ptr())
        self.rerouted: Tensor | None = None
        _layers[self.native.handle] = self

    def __call__(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        for name, tensor in (("hidden", hidden), ("top_k_index", top_k_index), ("top_k_weights", top_k_weights)):
            if tensor.device != self.device:
                raise ValueError(
                    f"{name}: expected on {self.device}, where this model's experts are, got one on {tensor.device} "
                    "(experts do not follow Module.to: name the device when the model is loaded)"
                )
        handle = self.native.handle
        arguments = (hidden, top_k_index, top_k_weights, self.anchor, handle, torch.is_grad_enabled())
        return run_op(torch.ops.usaf.experts_forward, handle, *arguments)

    @property
    def bank(self) -> RowBank | None:
        return self._bank

    def set_bank(self, bank: RowBank | None) -> None:
        """Train (and overlay) the neurons of `bank`, or none.

        Raises:
            ValueError: a bank of another layer, format, size or device.
        """
        self.native.set_bank(self._checked(bank, "bank"))
        self._bank = bank

    @property
    def frozen_bank(self) -> RowBank | None:
        return self._frozen_bank

    def set_frozen_bank(self, bank: RowBank | None) -> None:
        """Overlay the neurons of `bank` without training them, or none. A neuron in both banks is `bank`'s.

        Raises:
            ValueError: a bank of another layer, format, size or device, or a trainable one.
        """
        if bank is not None and bank.grad is not None:
            raise ValueError("bank: expected a frozen bank (trainable=False), got one with gradients")
        self.native.set_frozen_bank(self._checked(bank, "bank"))
        self._frozen_bank = bank

    def _checked(self, bank: RowBank | None, name: str) -> _C.RowBank | None:
        if bank is None:
            return None
        expected = (self.index, self.store.format, self.num_experts, self.hidden_size, self.intermediate_size)
        found = (bank.layer, bank.format, bank.num_experts, bank.hidden_size, bank.intermediate_size)
        if found != expected:
            raise ValueError(
                f"{name}: expected one of layer {self.index}, format {self.store.format!r}, sizes {expected[2:]}; "
                f"got layer {bank.layer}, format {bank.format!r}, sizes {found[2:]}"
            )
        if bank.device != self.device:
            raise ValueError(f"{name}: expected one on {self.device}, where the layer is, got one on {bank.device}")
        return bank.native

    def set_threshold(self, alpha: float, counts: Tensor | None = None) -> None:
        """Give no weight gradient to experts with fewer tokens than alpha * (mean over the experts).

        In such a backward the expert's rows of `bank.grad` and its `bank.expert_hit` stay as they are; the gradients of
        inputs and router weights flow all the same. Importance is measured without the threshold.

        Args:
            alpha: at least 0; 0 switches the threshold off.
            counts: tokens per expert, int64 [num_experts] on the CPU, contiguous, read at each backward; None: the
                counts of the micro-batch that is being run. With counts that are all zero no expert is left out.

        Raises:
            TypeError, ValueError: an alpha that is not a finite number of at least 0; counts of another kind.
        """
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
            raise TypeError(f"alpha: expected a number, got {type(alpha).__name__}")
        if counts is not None:
            if not isinstance(counts, Tensor) or counts.dtype != torch.int64:
                found = counts.dtype if isinstance(counts, Tensor) else type(counts).__name__
                raise TypeError(f"counts: expected an int64 tensor, got {found}")
            if counts.shape != (self.num_experts,) or counts.device.type != "cpu" or not counts.is_contiguous():
                raise ValueError(
                    f"counts: expected a contiguous CPU tensor of shape ({self.num_experts},), "
                    f"got shape {tuple(counts.shape)} on {counts.device}"
                )
        self.native.set_threshold(alpha, 0 if counts is None else counts.data_ptr())
        self._threshold_counts = counts

    @property
    def num_masked(self) -> int:
        """How often so far the threshold left the bank without the gradient of an expert's tokens in a micro-batch."""
        return self.native.num_masked

    def note_route(self, forward: Tensor, recomputed: Tensor) -> None:
        """Compare the top-k index of a forward with that of its recompute, on the device; see `check_routes`."""
        if self.rerouted is None:
            self.rerouted = torch.zeros((), dtype=torch.bool, device=forward.device)
        self.rerouted |= (forward != recomputed).any()

    def take_rerouted(self) -> Tensor | None:
        """Whether a recompute since the last call routed otherwise than its forward: bool, 0-dim; None: none ran."""
        flag, self.rerouted = self.rerouted, None
        return flag

    def begin_importance(self, metric: str = "gradient") -> Tensor:
        """Zeros of shape [num_experts, intermediate_size], fp32, to which every later backward adds each neuron's
        importance (over its gate row, up row and down column), until `end_importance`.

        Args:
            metric: "gradient" adds the sum of g^2 over the neuron's weights; "gradient_weight" the sum of |g * w|, with
                w as the model computes with it.

        Raises:
            ValueError: an unknown metric.
        """
        if metric not in IMPORTANCE_METRICS:
            raise ValueError(f"metric: expected one of {IMPORTANCE_METRICS}, got {metric!r}")
        shape = (self.num_experts, self.intermediate_size)
        self._importance = torch.zeros(shape, dtype=torch.float32, device=self.device)
        self.native.set_importance(self._importance.data_ptr(), metric)
        return self._importance

    def end_importance(self) -> None:
        self.native.set_importance(0, "gradient")
        self._importance = None

    def __deepcopy__(self, memo):
        raise TypeError("a paged expert layer cannot be copied: its memory and store are shared; load the model again")


class PagedExperts(nn.Module):
    """The experts of one MoE layer as a module, for any framework: `forward` is `PagedLayer.__call__`."""

    def __init__(self, layer: PagedLayer):
        super().__init__()
        self.usaf_layer = layer
        self.usaf_anchor = layer.anchor

    @property
    def layer(self) -> PagedLayer:
        return self.usaf_layer

    @classmethod
    def from_weights(
        cls,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        *,
        format: str = "nf4",
        device_budget: int | str = "auto",
        dtype: torch.dtype | None = None,
        activation: str = "silu",
        name: str = "experts",
        device: torch.device | str | int | None = None,
    ) -> PagedExperts:
        """Quantise plain expert weights into a store of one layer.

        Args:
            gate, up: [num_experts, intermediate_size, hidden_size], any floating dtype.
            down: [num_experts, hidden_size, intermediate_size].
            format: "nf4", "nf4_f16", "int8", "fp8" or "bf16".
            device_budget: see `ExpertMemory`.
            dtype: compute dtype (torch.float32, torch.bfloat16 or torch.float16); the weights' own by default.
            activation: "silu" or "gelu_tanh".
            device: where to compute; the weights' own by default.

        Raises:
            ValueError: shapes that do not fit together, weights that are not finite, an unknown format or device.
            BudgetError: the budget is too small.
        """
        if gate.dim() != 3:
            raise ValueError(f"gate: expected [num_experts, intermediate_size, hidden_size], got {tuple(gate.shape)}")
        num_experts, intermediate_size, hidden_size = gate.shape
        if up.shape != gate.shape:
            raise ValueError(f"up: expected the shape of gate {tuple(gate.shape)}, got {tuple(up.shape)}")
        if down.shape != (num_experts, hidden_size, intermediate_size):
            expected = (num_experts, hidden_size, intermediate_size)
            raise ValueError(f"down: expected {expected}, got {tuple(down.shape)}")
        device = resolve_device(gate.device if device is None else device)
        store = ExpertStore.create([name], num_experts, hidden_size, intermediate_size, format)
        for expert in range(num_experts):
            store.write_expert(0, expert, gate[expert], up[expert], down[expert])
        store.seal()
        memory = ExpertMemory(store, device_budget, gate.dtype if dtype is None else dtype, device=device)
        return cls(PagedLayer(memory, 0, activation))

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return self.usaf_layer(hidden, top_k_index, top_k_weights)

    def _apply(self, fn, recurse=True):
        return self  # the anchor stays fp32 and the pages stay where they are, whatever the model is cast to

    def extra_repr(self) -> str:
        layer = self.usaf_layer
        return (
            f"num_experts={layer.num_experts}, hidden_size={layer.hidden_size}, "
            f"intermediate_size={layer.intermediate_size}, format={layer.store.format}"
        )


def check_routes(layers: Iterable[PagedLayer]) -> None:
    """Raise UsafError if a recompute since the last call chose other experts than its forward.

    Its gradients would belong to another function than the loss. Waits for the device, once, only if something was
    recomputed.
    """
    taken = [(layer.name, layer.take_rerouted()) for layer in layers]
    recomputed = {name: flag for name, flag in taken if flag is not None}
    flags = torch.stack(list(recomputed.values())).tolist() if recomputed else []
    rerouted = [name for name, flag in zip(recomputed, flags) if flag]
    if rerouted:
        raise UsafError(
            f"gradient checkpointing: the recompute of {', '.join(rerouted)} sent tokens to other experts than the "
            "forward did, so these gradients are wrong: a router must give the same result twice (noise must come "
            "from torch's global generator)"
        )


def paged_layers(model: nn.Module) -> list[PagedLayer]:
    """The paged expert layers of a model, in the order of their MoE layer numbers.

    Raises:
        ValueError: the model has none.
    """
    found = (getattr(module, "usaf_layer", None) for module in model.modules())
    layers = [layer for layer in found if isinstance(layer, PagedLayer)]
    if not layers:
        raise ValueError("model: expected one with paged experts (load it with quantization_config=UsafConfig(...))")
    return sorted(layers, key=lambda layer: layer.index)


def trained_banks(model: nn.Module) -> list[RowBank]:
    """All that was learnt in a model's experts: its banks and those that re-selection froze, layer by layer."""
    banks = (bank for layer in paged_layers(model) for bank in (layer.bank, layer.frozen_bank))
    return [bank for bank in banks if bank is not None]


def expert_memory(model: nn.Module) -> ExpertMemory:
    """The device memory that a model's expert layers share."""
    return paged_layers(model)[0].memory


def expert_store(model: nn.Module) -> ExpertStore:
    """The store that a model's expert layers read."""
    return paged_layers(model)[0].store
