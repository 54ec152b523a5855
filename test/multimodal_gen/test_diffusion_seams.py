"""Where the diffusion runtime is touched: each place is as expected, or the start ends saying it."""

from __future__ import annotations

import msgspec
import pytest
from sglang.cli.plugins_first import COMMAND_LINE
from sglang.multimodal_gen.runtime.srt_encoder.seams import DIFFUSION
from sglang.srt.encode_only.seams import Seam, SeamError, check

SEAMS = [*COMMAND_LINE, *DIFFUSION]


@pytest.mark.parametrize("seam", SEAMS, ids=[seam.path for seam in SEAMS])
def test_a_seam_fits_the_installed_sglang_and_no_other(seam: Seam):
    check(seam)
    with pytest.raises(SeamError, match=f"{seam.path}: it is not there"):
        check(msgspec.structs.replace(seam, target=seam.target + "_gone"))
    with pytest.raises(SeamError, match=f"{seam.path}: it takes"):
        check(msgspec.structs.replace(seam, parameters=("another", *seam.parameters)))
