"""The states of torch's global random generators: the CPU's and that of the model's device."""

from __future__ import annotations

import torch

States = dict[str, torch.Tensor]  # by device type, each uint8 on the CPU


def rng_states(device: torch.device) -> States:
    """The states of the CPU's generator and of `device`'s. Nothing waits for the device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device.type).get_rng_state(device)
    return states


def set_rng_states(states: States, device: torch.device) -> None:
    """Put the generators back to `states`; those taken beside a device of another type leave that of `device` alone."""
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu" and device.type in states:
        torch.get_device_module(device.type).set_rng_state(states[device.type], device)


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the CPU's generator and, where `device` is a GPU, its own."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        with torch.accelerator.device_index(device.index):
            torch.get_device_module(device.type).manual_seed(seed)
