"""Weight updates of a diffusion server, of which an encoder on srt cannot be a part.

Stock would find no weights in it and report success.
"""

from __future__ import annotations

import torch
from sglang.multimodal_gen.runtime.srt_encoder.encoder import SrtTextEncoder


def refuse_encoders_on_srt(
    found: list[tuple[str, torch.nn.Module]], self: object, target_modules: list[str] | None
) -> list[tuple[str, torch.nn.Module]]:
    """AFTER `WeightsUpdater._collect_modules`, whose ValueError is the update's answer."""
    on_srt = [name for name, module in found if isinstance(module, SrtTextEncoder)]
    if on_srt:
        others = [name for name, _ in found if name not in on_srt]
        raise ValueError(
            f"{', '.join(on_srt)} on srt: the weights are not this server's to update. Update them "
            "where they are (POST /update_weights_from_disk of an encode-only server) or start "
            f"again; for the rest give target_modules {others}."
        )
    return found
