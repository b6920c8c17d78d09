"""Which networks may be trained privately, and which of their parameters are.

Noise is added to every trained parameter, so its norm grows with the square root of their number: a network that
starts from public weights gains from training few of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fediod_med.errors import PrivacyError

CHOICES = ("all", "decoder", "ends", "norms", "head")

# By class name: parameter names of the decoder and of the head (the last block, which makes the logits). The levels of
# MONAI's UNet are nested: every level but the deepest is (down 0, next level 1, up 2).
_DECODER: Mapping[str, str] = {
    "UNet": r"model\.(1\.submodule\.)*2\.",
    "SegResNet": r"(up_layers|up_samples|conv_final)\.",
    "DynUNet": r"(upsamples|output_block)\.",
}
# The outermost blocks: what meets the scan first, and what makes the logits.
_ENDS: Mapping[str, str] = {
    "UNet": r"model\.[02]\.",
    "SegResNet": r"(convInit|down_layers\.0|up_layers\.(?P<last>\d+)|conv_final)\.",
    "DynUNet": r"(input_block|upsamples\.(?P<last>\d+)|output_block)\.",
}
_HEAD: Mapping[str, str] = {
    "UNet": r"model\.2\.",
    "SegResNet": r"conv_final\.",
    "DynUNet": r"output_block\.",
}


def check_private_network(network: nn.Module) -> None:
    """Refuse layers that couple patients or remember them outside the trained parameters.

    Batch normalisation makes one patient's activations depend on the others' in the batch; running statistics are
    exact averages over patients that no noise covers.

    Raises:
        PrivacyError: names the first such module.
    """
    for name, module in network.named_modules():
        if isinstance(module, _InstanceNorm):
            if module.track_running_stats:
                raise PrivacyError(
                    f"private training: {name or 'the network'} ({type(module).__name__}) keeps running statistics of "
                    "patients; expected instance norm with track_running_stats=False"
                )
        elif isinstance(module, _BatchNorm):
            raise PrivacyError(
                f"private training: {name or 'the network'} is a {type(module).__name__}, which mixes patients; "
                "expected group, layer or instance norm"
            )


def select_trainable(network: nn.Module, which: str) -> int:
    """Freeze all parameters but the chosen ones, in place.

    Args:
        network: any module for `all`; MONAI's `UNet`, `SegResNet` or `DynUNet` for the others.
        which: `all`; `decoder`, every layer after the deepest one; `ends`, the first and the last block, which hold
            nearly all of a warm-started network's gradient; `head`, the last block; `norms`, the head and every
            vector: scales, shifts, biases and slopes (Bu et al. 2022, arXiv 2210.00036, train the biases alone).

    Returns:
        Number of trainable scalars.

    Raises:
        PrivacyError: unknown choice, unknown architecture, or a network without such parameters.
    """
    if which not in CHOICES:
        raise PrivacyError(f"trainable: expected {', '.join(CHOICES)}, found {which!r}")
    kind = type(network).__name__
    if which != "all" and kind not in _HEAD:
        raise PrivacyError(f"trainable: {which} is known for {', '.join(_HEAD)}, found a {kind}; use all")
    vectors = [
        name for name, p in network.named_parameters() if p.dim() <= 1 and not re.match(_HEAD.get(kind, ""), name)
    ]
    if which == "norms" and not vectors:
        raise PrivacyError(f"trainable: this {kind} has no scale, shift or slope outside its head; use head or decoder")
    patterns = {"all": "", "decoder": _DECODER.get(kind, ""), "ends": _ENDS.get(kind, "")}
    pattern = patterns.get(which, _HEAD.get(kind, ""))
    found = {name: re.match(pattern, name) for name, _ in network.named_parameters()}
    last = max((int(m["last"]) for m in found.values() if m and m.groupdict().get("last")), default=None)
    count = 0
    for name, parameter in network.named_parameters():
        match = found[name]
        chosen = match is not None and (match.groupdict().get("last") in (None, str(last)))
        chosen |= which == "norms" and name in vectors
        parameter.requires_grad_(chosen)
        count += parameter.numel() if chosen else 0
    return count


def trainable_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Parameters that require a gradient, in the order of the network; `PrivacyError` when there is none."""
    chosen = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not chosen:
        raise PrivacyError("private training: every parameter is frozen; call select_trainable first")
    return chosen
