"""Paged tiny models with chosen neurons, and the same model in dense float64 as an oracle."""

from __future__ import annotations

import devices
import torch
from transformers import AutoModelForCausalLM
from usaf_ext import UsafConfig, expert_store, paged_layers
from usaf_ext.selection import Selection, attach


def paged_model(checkpoint, dtype=torch.float32, format="nf4"):
    """On the device whose turn it is."""
    config = UsafConfig(format=format, device=devices.current())
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, quantization_config=config)


def dense_twin(checkpoint, model):
    """The plain float64 model whose experts hold the decoded weights of `model`'s store; only experts need grad."""
    dense = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64).to(devices.current())
    dense.set_experts_implementation("eager")
    dense.requires_grad_(False)
    for layer in paged_layers(model):
        experts = dense.get_submodule(layer.name)
        with torch.no_grad():
            for expert in range(layer.num_experts):
                gate, up, down = expert_store(model).read_expert(layer.index, expert)
                experts.gate_up_proj[expert] = torch.cat([gate, up]).double()
                experts.down_proj[expert] = down.double()
        experts.requires_grad_(True)
    return dense


def neuron_gradients(dense, layer):
    """Gradients of a layer's neurons in the dense twin: [E, I, 3, H] in the order gate, up, down column."""
    experts = dense.get_submodule(layer.name)
    gate, up = experts.gate_up_proj.grad.chunk(2, dim=1)
    return torch.stack([gate, up, experts.down_proj.grad.transpose(1, 2)], dim=2)


def every_nth(model, n=5):
    """A selection of every n-th neuron of each layer."""
    experts, indices = [], []
    for layer in paged_layers(model):
        position = torch.arange(layer.index % n, layer.num_experts * layer.intermediate_size, n)
        experts.append((position // layer.intermediate_size).int())
        indices.append((position % layer.intermediate_size).int())
    total = sum(layer.num_experts * layer.intermediate_size for layer in paged_layers(model))
    return Selection(tuple(experts), tuple(indices), total)


def banked_model(checkpoint, dtype=torch.float32, format="nf4", **options):
    """A paged model with a bank of every fifth neuron in each layer; anchors alone require grad."""
    model = paged_model(checkpoint, dtype, format)
    attach(model, every_nth(model), originals=model.usaf_originals, **options)
    return model


def give_gradient(layer, gradient):
    """Put a gradient into a bank as the expert layer's backward does."""
    bank = layer.bank
    bank.grad.copy_(gradient)
    bank.expert_hit.fill_(1)
    squares = bank.grad.double().square().sum(2)
    if bank.device.type == "cpu":
        bank.grad_squares.zero_().index_add_(0, bank.neuron_expert.long(), squares.sum(1))
    else:
        bank.grad_squares.copy_(squares)
    layer.anchor.grad = bank.grad.double().norm().float().reshape(1)


def tokens(count, length=24, seed=0, vocabulary=260):
    ids = torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))
    return ids.to(devices.current())


def bank_state(model):
    """Copies of every bank tensor that training may change."""
    return [
        {
            name: getattr(layer.bank, name).clone()
            for name in ("codes", "absmax", "master", "residual")
            if getattr(layer.bank, name) is not None
        }
        for layer in paged_layers(model)
        if layer.bank is not None
    ]


def same_bits(first, second):
    """Whether two nested structures of dicts, lists and tensors hold the same bits, wherever they lie."""
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first.cpu(), second.cpu())
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same_bits(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same_bits, first, second))
    return first == second
