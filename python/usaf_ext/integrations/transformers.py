"""transformers: `AutoModelForCausalLM.from_pretrained(path, quantization_config=UsafConfig(...))`.

`path` is a plain checkpoint, whose experts are quantised while they stream in, or a store. transformers loads the dense
part; before it does, the experts' parameters are taken off the (meta) skeleton, so that it has nowhere to put the
checkpoint's expert tensors and never reads them. Afterwards the experts are filled in, one at a time. The same is done
to dense weights that bitsandbytes quantised to NF4: they are filled in decoded.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import _C
from ..checkpoint_source import ModelSource, find_checkpoint_key
from ..checkpointing import save_expert_outputs
from ..devices import CPU, check_compute_dtype, gpus, resolve_device
from ..errors import BudgetError, UsafError
from ..experts import PagedLayer
from ..memory import ExpertMemory
from ..originals import open_originals
from ..sizes import parse_size
from ..store import ExpertStore, is_store

logger = logging.getLogger(__name__)

METHOD = "usaf"
DEFAULT_FORMAT = "nf4"
# transformers' name of an activation -> ours
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")


@register_quantization_config(METHOD)
class UsafConfig(QuantizationConfigMixin):
    """How to hold and page the experts of a model.

    Args:
        format: weight format of the experts, one of `_C.FORMATS`. None: a store's own, "nf4" for a plain checkpoint.
        device_budget: bytes for page slots and decode scratch together, an int or a text such as "12GiB", or "auto".
        originals: folder of the original checkpoint, where a store was moved away from the one it was made of.
        host_budget: bytes of the process's memory for all experts, see `ExpertMemory`; an int or a text. A store that
            does not fit is left on disk; a plain checkpoint must fit. None: no limit.
        device: where the model goes, dense part and experts: "cpu", "cuda", "cuda:1", or "auto", a GPU if there is one.
            None: what `device_map` of from_pretrained says, and without one the CPU. A device_map needs the package
            accelerate; this does not.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.
    """

    def __init__(
        self,
        format: str | None = None,
        device_budget: int | str = "auto",
        originals: str | Path | None = None,
        host_budget: int | str | None = None,
        device: str | torch.device | None = None,
    ):
        if format is not None and format not in _C.FORMATS:
            raise ValueError(f"format: expected one of {tuple(_C.FORMATS)} or None, got {format!r}")
        if isinstance(device_budget, bool) or not isinstance(device_budget, (int, str)):
            raise TypeError(f"device_budget: expected an int or a text, got {type(device_budget).__name__}")
        if isinstance(host_budget, bool) or not isinstance(host_budget, (int, str, type(None))):
            raise TypeError(f"host_budget: expected an int, a text or None, got {type(host_budget).__name__}")
        if originals is not None and not isinstance(originals, (str, Path)):
            raise TypeError(f"originals: expected a path or None, got {type(originals).__name__}")
        if not isinstance(device, (str, torch.device, type(None))):
            raise TypeError(f"device: expected a device, its name or None, got {type(device).__name__}")
        if device_budget != "auto":
            parse_size(device_budget, "device_budget")
        if host_budget is not None:
            parse_size(host_budget, "host_budget")
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format = format
        self.device_budget = device_budget
        self.host_budget = host_budget
        self.originals = None if originals is None else str(originals)
        self.device = None if device is None else str(device)

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        arguments = {key: value for key, value in config_dict.items() if key != "quant_method"}
        return super().from_dict(arguments, return_unused_kwargs=return_unused_kwargs, **kwargs)


def _experts_forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    return module.usaf_layer(hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(METHOD, _experts_forward)


class _PagedExpertsMixin:
    """Put before a family's experts class. Its parameters are gone; `usaf_layer` computes, `usaf_anchor` is trained."""

    def _apply(self, fn, recurse=True):
        return self  # casts and moves concern the dense part: the anchor stays fp32, the pages where they are

    def extra_repr(self) -> str:
        layer = getattr(self, "usaf_layer", None)
        return "" if layer is None else f"layer={layer.index}, num_experts={layer.num_experts}, {layer.store.format}"


def _activation_of(name: str, module: Any) -> str:
    for hf_name, ours in _ACTIVATIONS.items():
        if type(getattr(module, "act_fn", None)) is type(ACT2FN[hf_name]):
            return ours
    config = module.config
    found = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    raise ValueError(f"{name}: activation {found!r} is not supported; expected one of {tuple(_ACTIVATIONS)}")


def _check_family(name: str, module: Any) -> None:
    """Raise ValueError naming what this experts module has that the expert layer does not compute yet."""
    reasons = [
        (module.has_bias, "biases"),
        (module.is_transposed, "transposed weights"),
        (not module.is_concatenated, "interleaved gate and up rows"),
        (not module.has_gate, "no gate"),
        (getattr(module, "has_post_expert_norm", False), "a norm after each expert"),
        (type(module)._apply_gate is not _default_apply_gate, "a gate function of its own"),
        (set(module._parameters) != set(_EXPERT_PARAMETERS), f"the parameters {sorted(module._parameters)}"),
    ]
    for applies, what in reasons:
        if applies:
            raise ValueError(f"{name} ({type(module).__name__}) has {what}: this family is not supported yet")


def find_experts(model: nn.Module) -> dict[str, Any]:
    """The experts modules that transformers lets us replace, by name, in order."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "is_concatenated")}


def _match_layers(experts: dict[str, Any], layer_names: list[str], folder: Path, prefix: str) -> dict[str, int]:
    """Module name -> number of its layer. A checkpoint may lack the base model's prefix, or a module may."""

    def bare(name: str) -> str:
        return name.removeprefix(f"{prefix}.") if prefix else name

    numbers = {bare(name): number for number, name in enumerate(layer_names)}
    missing = [name for name in experts if bare(name) not in numbers]
    unused = sorted(set(numbers) - {bare(name) for name in experts})
    if missing or unused:
        raise ValueError(
            f"{folder}: its expert layers do not fit the model's: "
            f"{f'no weights for {missing[0]}' if missing else f'no module for {unused[0]}'}"
        )
    return {name: numbers[bare(name)] for name in experts}


def _check_sizes(experts: dict[str, Any], store: ExpertStore, folder: Path) -> None:
    expected = (store.num_experts, 2 * store.intermediate_size, store.hidden_size)
    for name, module in experts.items():
        shape = tuple(module.gate_up_proj.shape)
        if shape != expected:
            raise ValueError(f"{name}.gate_up_proj: the model expects {shape}, {folder} has {expected}")


def _unexpected(model: PreTrainedModel, name: str) -> str:
    """Beginning of a pattern of checkpoint keys that belong to the module or parameter `name`."""
    return rf"(^|\.){re.escape(name.removeprefix(f'{model.base_model_prefix}.'))}"


def _take_packed(model: PreTrainedModel, source: ModelSource) -> dict[str, str]:
    """Take off a model's (meta) parameters that a checkpoint holds in NF4; parameter name -> checkpoint key."""
    taken: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        bare = name.removeprefix(f"{model.base_model_prefix}.")
        key = find_checkpoint_key(source, name) or find_checkpoint_key(source, bare)
        if key not in source.packed:
            continue
        if parameter.shape != source.packed[key].shape:
            expected, found = list(parameter.shape), list(source.packed[key].shape)
            raise ValueError(f"{name}: the model expects {expected}, {source.path} has {found}")
        taken[name] = key
    for key in source.packed.keys() - taken.values():
        if not source.is_expert_key(key):
            raise ValueError(
                f"{source.path}: {key} is in NF4 and no parameter of the model; "
                f"make a store of the checkpoint first: usaf-ext quantize {source.path} STORE"
            )
    for name in taken:
        module_name, _, parameter_name = name.rpartition(".")
        module = model.get_submodule(module_name)
        del module._parameters[parameter_name]
        module._is_hf_initialized = True  # type: ignore[assignment]  # its _init_weights would look for the parameter
    return taken


def _save_expert_outputs(model: PreTrainedModel) -> None:
    """However gradient checkpointing is switched on (Trainer, PEFT, by hand), it ends in this method of the model."""
    set_checkpointing = model._set_gradient_checkpointing

    def set_saving(enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **kwargs: Any) -> None:
        function = save_expert_outputs(gradient_checkpointing_func)
        set_checkpointing(enable=enable, gradient_checkpointing_func=function, **kwargs)

    model._set_gradient_checkpointing = set_saving  # type: ignore[method-assign, assignment]


def _device_of(device: str | None, device_map: Any) -> torch.device:
    """The one device that UsafConfig's `device` and from_pretrained's `device_map` mean. Raises ValueError."""
    places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    if device_map in ("balanced", "balanced_low_0", "sequential") or len(places) != 1:
        raise ValueError(
            f"device_map: expected one device for the whole model (None, 'auto', 'cpu', 'cuda:0', {{'': 0}}), got "
            f"{device_map!r}: paged experts and the dense part run on one device"
        )
    (place,) = places
    if place == "disk":
        raise ValueError("device_map: 'disk' is no device to compute on; a store too large for host_budget stays there")
    if place == "auto" and len(gpus()) > 1:
        raise ValueError(f"device_map: 'auto' with {len(gpus())} GPUs: name one, e.g. 'cuda:0'; a model runs on one")
    mapped = None if place is None else resolve_device(place, "device_map")
    if device is None:
        return mapped or CPU
    wanted = resolve_device(device)
    if mapped not in (None, wanted):
        raise ValueError(f"device: {device!r} and device_map {device_map!r} are not the same")
    return wanted


@register_quantizer(METHOD)
class UsafHfQuantizer(HfQuantizer):
    """Takes the experts out of transformers' loading and attaches paged ones. One object per `from_pretrained`."""

    quantization_config: UsafConfig
    requires_calibration = False
    is_trainable = True
    is_qat_trainable = True  # Trainer accepts the model without an adapter

    def is_serializable(self, *args, **kwargs) -> bool:
        raise UsafError(
            "save_pretrained would write a model without its experts: use usaf_ext.export for a plain checkpoint, "
            "or ExpertStore.save for a store"
        )

    def validate_environment(self, *args, device_map=None, **kwargs) -> None:
        self._device = _device_of(self.quantization_config.device, device_map)

    def update_device_map(self, device_map):
        # "auto" would share the model out between devices by the size of a model whose experts it does not know.
        return {"": self._device} if device_map == "auto" else device_map

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, dtype=None, **kwargs):
        config = self.quantization_config
        if not checkpoint_files:
            raise ValueError("from_pretrained: expected a checkpoint or store folder, got no checkpoint files")
        folder = Path(checkpoint_files[0]).parent
        experts = find_experts(model)
        if not experts:
            raise ValueError(f"{type(model).__name__} has no experts that transformers lets us replace")
        for name, module in experts.items():
            _check_family(name, module)
        self._activations = {name: _activation_of(name, module) for name, module in experts.items()}
        self._dtype = dtype if dtype is not None else torch.get_default_dtype()
        check_compute_dtype(self._dtype, self._device)
        self._source: ModelSource | None
        self._format = config.format or DEFAULT_FORMAT
        with torch.device("cpu"):  # from_pretrained makes tensors on the meta device here
            if is_store(folder):
                store = ExpertStore.open_within(folder, config.host_budget)
                if config.format not in (None, store.format):
                    raise ValueError(f"format: {folder} is a store of {store.format}, not of {config.format}")
                self._source = open_originals(store, config.originals)
            else:
                if config.originals is not None:
                    raise ValueError(f"originals: {folder} is itself an original checkpoint; leave it out")
                self._source = ModelSource.open(folder)
                # Until the dense part is loaded only its sizes are needed, to refuse a small budget.
                store = ExpertStore.unfilled(self._source, self._format)
        self._numbers = _match_layers(experts, store.layer_names, folder, model.base_model_prefix)
        _check_sizes(experts, store, folder)
        ExpertMemory.slots_for(store, config.device_budget, self._dtype, self._device)
        try:
            ExpertMemory.buffers_for(store, config.host_budget)
        except BudgetError as error:
            if store.sealed:
                raise
            raise BudgetError(
                f"{error}; with less, quantise it into a store on disk first: usaf-ext quantize {folder} STORE"
            ) from None
        self._opened = store if store.sealed else None
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        for name, module in experts.items():
            for parameter in _EXPERT_PARAMETERS:
                del module._parameters[parameter]
            module.__class__ = type(f"Paged{type(module).__name__}", (_PagedExpertsMixin, type(module)), {})
            module._is_hf_initialized = True  # its _init_weights would look for the parameters
            module.config._experts_implementation = METHOD
            ignored.add(_unexpected(model, name) + r"\.")
        unread = None if store.sealed else self._source  # a store's dense part is plain
        self._packed = _take_packed(model, unread) if unread is not None and unread.packed else {}
        ignored |= {
            rf"(^|\.){re.escape(name.removeprefix(f'{model.base_model_prefix}.'))}(\.|$)" for name in self._packed
        }
        model._keys_to_ignore_on_load_unexpected = ignored
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        with torch.device("cpu"):  # whatever the caller's default is
            store = self._opened
            if store is None:
                assert self._source is not None
                store = ExpertStore.quantize(self._source, self._format)
            for name, key in self._packed.items():
                assert self._source is not None
                module, _, parameter = name.rpartition(".")
                weight = self._source.read_tensor(key).to(self._dtype)
                model.get_submodule(module).register_parameter(parameter, nn.Parameter(weight))
            model.to(self._device)  # before the slots take what is free
            config = self.quantization_config
            memory = ExpertMemory(store, config.device_budget, self._dtype, config.host_budget, self._device)
            model.requires_grad_(False)
            for name, number in self._numbers.items():
                module = model.get_submodule(name)
                module.usaf_layer = PagedLayer(memory, number, self._activations[name])
                module.register_parameter("usaf_anchor", module.usaf_layer.anchor)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                _save_expert_outputs(module)
        model.usaf_originals = self._source
        del model.config.quantization_config  # a later save must not ask for us when it is loaded
        return model


def originals_of(model: nn.Module) -> ModelSource | None:
    """The original checkpoint of a loaded model, or None when it is not at hand."""
    return getattr(model, "usaf_originals", None)
