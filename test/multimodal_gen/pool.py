"""A pipeline whose roles one program starts, by upstream's `launch_pool_disagg_server`."""

import sys

from sglang.multimodal_gen.runtime import launch_server
from sglang.multimodal_gen.runtime.platforms.plugins import apply_plugin_hooks
from sglang.multimodal_gen.runtime.server_args import prepare_server_args

if __name__ == "__main__":
    apply_plugin_hooks()
    launch_server.launch_pool_disagg_server(
        prepare_server_args(sys.argv[1:]),
        encoder_gpus=[[0]],
        denoiser_gpus=[[0]],
        decoder_gpus=[[0]],
    )
