"""Every place where stock's diffusion runtime is touched, as data.

What a seam is, and the code that checks and installs them, is in `srt/encode_only/seams.py`.
Official extension points that need no seam: the entry point group `sglang.multimodal_gen.plugins`,
the component loader's registration by subclassing. The seam of `sglang generate` is in
`cli/plugins_first.py`.
"""

from __future__ import annotations

from sglang.srt.encode_only.seams import Seam

DIFFUSION: tuple[Seam, ...] = (
    Seam(
        target="sglang.multimodal_gen.configs.pipeline_configs.base:PipelineConfig.add_cli_args",
        kind="after",
        hook="sglang.multimodal_gen.runtime.srt_encoder.option:add_flag",
        parameters=("parser", "prefix"),
        process="diffusion",
        reason="The flag --srt-encoders.",
        upstream="the flag, there",
    ),
    Seam(
        target="sglang.multimodal_gen.configs.pipeline_configs.base"
        ":PipelineConfig.update_config_from_dict",
        kind="before",
        hook="sglang.multimodal_gen.runtime.srt_encoder.option:take_from_arguments",
        parameters=("self", "args", "prefix"),
        process="diffusion",
        reason="The option from the command line, a config file or Python keywords.",
        upstream="a field `srt_encoders` of PipelineConfig",
    ),
    Seam(
        target="sglang.multimodal_gen.configs.pipeline_configs.base"
        ":PipelineConfig.update_pipeline_config",
        kind="before",
        hook="sglang.multimodal_gen.runtime.srt_encoder.option:take_from_config",
        parameters=("self", "source_pipeline_dict"),
        process="diffusion",
        reason="The option from the JSON of a pipeline config.",
        upstream="nothing, with the field",
    ),
    Seam(
        target="sglang.multimodal_gen.runtime.server_args.server_args"
        ":ServerArgs._validate_pipeline",
        kind="after",
        hook="sglang.multimodal_gen.runtime.srt_encoder.option:check",
        parameters=("self",),
        process="diffusion",
        reason="A bad value ends the start, before anything is loaded.",
        upstream="a call in ServerArgs._validate_pipeline",
    ),
    Seam(
        target="sglang.multimodal_gen.runtime.loader.component_loaders.component_loader"
        ":ComponentLoader._ensure_loaders_registered",
        kind="after",
        hook="sglang.multimodal_gen.runtime.srt_encoder.plugin:register_loader",
        parameters=("cls",),
        process="diffusion",
        reason="Stock imports the loaders of its own folder, where a checkout of ours is not.",
        upstream="the branch for srt in TextEncoderLoader.load_customized",
    ),
    *(
        Seam(
            target=f"sglang.multimodal_gen.runtime.launch_server:{function}",
            kind="around",
            hook=f"sglang.multimodal_gen.runtime.srt_encoder.deployment:{hook}",
            parameters=parameters,
            process="diffusion",
            reason="Servers of the placement `server` start before the workers and end after them.",
            upstream="the block in launch_server",
        )
        for function, hook, parameters in (
            ("launch_server", "launch", ("server_args", "launch_http_server")),
            ("launch_disagg_role", "launch", ("server_args",)),
            (
                "launch_pool_disagg_server",
                "launch_pool",
                (
                    "server_args",
                    "encoder_gpus",
                    "denoiser_gpus",
                    "decoder_gpus",
                    "launch_http_server",
                ),
            ),
        )
    ),
    Seam(
        target="sglang.multimodal_gen.runtime.server_args.server_args:ServerArgs.for_disagg_role",
        kind="around",
        hook="sglang.multimodal_gen.runtime.srt_encoder.option:keep_for_role",
        parameters=("self", "role_type", "overrides"),
        process="diffusion",
        reason="A role's workers get a new pipeline config, without what was given for it.",
        upstream="keep the pipeline config, but for what is resolved from the ranks",
    ),
    Seam(
        target="sglang.multimodal_gen.runtime.cache.conditioning:ConditioningCache.run",
        kind="around",
        hook="sglang.multimodal_gen.runtime.srt_encoder.cached:unless_changed",
        parameters=(
            "self",
            "model",
            "method",
            "args",
            "kwargs",
            "compute",
            "group",
            "nested",
            "namespace",
            "share_in_group",
            "cross_request",
            "keep_on_device",
        ),
        process="diffusion",
        reason="A weight update at an encode-only server is not seen here.",
        upstream="the version of an encoder's weights in the key of an entry",
    ),
    Seam(
        target="sglang.multimodal_gen.runtime.pipelines_core.stages.text_encoding"
        ":TextEncodingStage.forward",
        kind="around",
        hook="sglang.multimodal_gen.runtime.srt_encoder.together:one",
        parameters=("self", "batch", "server_args"),
        process="diffusion",
        reason="The encoders of a prompt, and its negative one, are asked together.",
        upstream="tokenize for every encoder first, and let encoders return futures",
    ),
    Seam(
        target="sglang.multimodal_gen.runtime.pipelines_core.stages.text_encoding"
        ":TextEncodingStage.run_grouped_requests",
        kind="around",
        hook="sglang.multimodal_gen.runtime.srt_encoder.together:group",
        parameters=("self", "batches", "server_args"),
        process="diffusion",
        reason="The prompts of a batch of requests go to an encoder in one call.",
        upstream="the same, over all requests of the group",
    ),
    Seam(
        target="sglang.multimodal_gen.runtime.managers.scheduler:Scheduler.recv_reqs",
        kind="around",
        hook="sglang.multimodal_gen.runtime.srt_encoder.queued:take",
        parameters=("self",),
        process="diffusion",
        reason="What was read while a request denoised comes first.",
        upstream="a deque in front of the waiting queue",
    ),
    Seam(
        target="sglang.multimodal_gen.runtime.utils.perf_logger:StageProfiler.__exit__",
        kind="after",
        hook="sglang.multimodal_gen.runtime.srt_encoder.queued:look",
        parameters=("self", "exc_type", "exc_val", "exc_tb"),
        process="diffusion",
        reason="Prompts that wait are encoded meanwhile, where the encoder is on a server.",
        upstream="a callback of the scheduler at the end of a denoising step",
    ),
    Seam(
        target="sglang.multimodal_gen.runtime.managers.gpu_worker"
        ":configure_layerwise_offload_modules",
        kind="around",
        hook="sglang.multimodal_gen.runtime.srt_encoder.weights:not_layerwise",
        parameters=(
            "modules",
            "server_args",
            "component_names",
            "warn_missing",
            "pin_budget",
        ),
        process="diffusion",
        reason="An encoder on srt has no layers to offload, over which a start would end.",
        upstream="leave out modules without weights, there",
    ),
    Seam(
        target="sglang.multimodal_gen.runtime.post_training.weights_updater"
        ":WeightsUpdater._collect_modules",
        kind="after",
        hook="sglang.multimodal_gen.runtime.srt_encoder.weights:refuse_updates",
        parameters=("self", "target_modules"),
        process="diffusion",
        reason="An update would find no weights in an encoder on srt, and report success.",
        upstream="the same check, there",
    ),
    Seam(
        target="sglang.multimodal_gen.runtime.post_training.gpu_worker_post_training_mixin"
        ":GPUWorkerPostTrainingMixin.get_weights_checksum",
        kind="after",
        hook="sglang.multimodal_gen.runtime.srt_encoder.weights:no_checksum",
        parameters=("self", "module_names"),
        process="diffusion",
        reason="The checksum of an encoder on srt would be that of no weights, always the same.",
        upstream="say of a module without weights that it has none, there",
    ),
    Seam(
        target="sglang.multimodal_gen.runtime.managers.memory_managers.memory_occupation_controller"
        ":MemoryOccupationController.release_memory_occupation",
        kind="around",
        hook="sglang.multimodal_gen.runtime.srt_encoder.weights:refuse_sleep",
        parameters=("self",),
        process="diffusion",
        reason="Sleep would leave an encoder on srt where it is, and report success.",
        upstream="the same check, there",
    ),
    Seam(
        target="sglang.multimodal_gen.runtime.entrypoints.http_server:create_app",
        kind="after",
        hook="sglang.multimodal_gen.runtime.srt_encoder.http_app:extend",
        parameters=("server_args", "worker_pids", "disagg_server"),
        process="diffusion",
        reason="A caller of `sglang serve` is told which encoder failed, and why; the server is "
        "healthy only while its encoders are.",
        upstream="answer a failed generation with the scheduler's error; ask the encoders in the "
        "health route",
    ),
)
"""Installed in every process of the diffusion runtime that loads plugins."""

PORTABLE_CPU: tuple[Seam, ...] = (
    Seam(
        target="sglang.multimodal_gen.runtime.launch_server:_start_scheduler_processes",
        kind="around",
        hook="sglang.multimodal_gen.runtime.platforms.portable_cpu:fork_workers",
        parameters=("server_args", "ranks", "name_prefix"),
        process="diffusion",
        reason="On a CPU a worker need not import what the process that starts it has imported.",
        upstream="`fork` as the start method of a CPU's platform, where the caller is a server",
    ),
    Seam(
        target="sglang.multimodal_gen.runtime.server_args.server_args"
        ":ServerArgs._adjust_platform_specific",
        kind="after",
        hook="sglang.multimodal_gen.runtime.platforms.portable_cpu:sleep_on_idle",
        parameters=("self",),
        process="diffusion",
        reason="A worker that polls while it has nothing to do takes a core from encoders on the "
        "same CPU.",
        upstream="--sleep-on-idle as the default where the platform is a CPU, as in srt",
    ),
    Seam(
        target="sglang.multimodal_gen.runtime.disaggregation.scheduler_mixin"
        ":SchedulerDisaggMixin._init_disagg_state",
        kind="around",
        hook="sglang.multimodal_gen.runtime.platforms.host_transfer:without_streams",
        parameters=("self", "server_args", "local_rank"),
        process="diffusion",
        reason="A role asks for a CUDA stream, also where there is no GPU.",
        upstream="no stream where the platform is a CPU",
    ),
    Seam(
        target="sglang.multimodal_gen.runtime.disaggregation.scheduler_mixin"
        ":create_transfer_engine",
        kind="around",
        hook="sglang.multimodal_gen.runtime.platforms.host_transfer:create_engine",
        parameters=("hostname", "gpu_id", "ib_device"),
        process="diffusion",
        reason="Roles on a CPU need no Mooncake, which is no dependency of sglang.",
        upstream="a backend of --disagg-transfer-backend, of which stock reads none",
    ),
)
"""How workers start on a CPU, and what the roles of a disaggregated pipeline need there, with
native encoders too. Installed where there is no accelerator."""
