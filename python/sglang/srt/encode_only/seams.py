"""Every place where upstream is touched, as data, and the code that checks and installs them.

A seam names a function of sglang, what is done to it, in which processes, why, and how the change
would read in an upstream pull request. Before a seam is installed its target is looked up in the
installed sglang and its parameters are compared; sglang's own hook registry would only log a
failure and go on.

Official extension points that need no seam: model classes by their place in `sglang/srt/models/`,
`register_resolution_hook`, `add_attention_backend_choices`, `register_attention_backend`,
`SamplingParams.custom_params` (carries what a request asks for), `pooled_hidden_states` (carries
the answer), the platform entry point.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterable
from typing import Any, Literal

import msgspec
from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

SUPPORTED_SGLANG = "0.5.23"

_SOURCE = HookSource(plugin_name="encode_only", dist_name="sglang-encoder")


class SeamError(SystemExit):
    """A seam does not fit the installed sglang. Ends the process with its message.

    A SystemExit, because sglang's plugin loader logs ordinary exceptions and starts without the
    plugin.
    """


class Seam(msgspec.Struct, frozen=True, kw_only=True):
    """One change to upstream.

    Attributes:
        target: `module:attribute`, a function, method or class of sglang.
        kind: what is done to it; `replace` is for classes.
        hook: `module:attribute` of what is put there.
        parameters: the target's parameter names as we expect them, empty for a class.
        process: where it takes effect: in `any` that reads srt's arguments, in the `scheduler`
            (and the worker inside another process), in the `server` (HTTP and tokenizer), or in
            the processes of the `diffusion` runtime.
        reason: why it is needed.
        upstream: how the change would read there.
    """

    target: str
    kind: Literal["before", "after", "around", "replace"]
    hook: str
    parameters: tuple[str, ...] = ()
    process: Literal["any", "scheduler", "server", "diffusion"]
    reason: str
    upstream: str

    @property
    def module(self) -> str:
        """The module that holds the target."""
        return self.target.partition(":")[0]

    @property
    def path(self) -> str:
        """The target as sglang's hook registry names it."""
        return self.target.replace(":", ".")


ALWAYS: tuple[Seam, ...] = (
    Seam(
        target="sglang.srt.server_args:ServerArgs",
        kind="replace",
        hook="sglang.srt.encode_only.server_args:ServerArgs",
        process="any",
        reason="is_embedding_encoder has to be a field like any other: on the command line, in "
        "config files, in Engine(...), in the pickle that child processes get.",
        upstream="one field in arg_groups/fields/model.py",
    ),
    Seam(
        target="sglang.srt.entrypoints.engine:Engine.server_args_class",
        kind="replace",
        hook="sglang.srt.encode_only.server_args:ServerArgs",
        process="any",
        reason="Engine took its class of arguments when it was imported.",
        upstream="nothing, with the field upstream",
    ),
)
"""Installed where srt's plugins are loaded. None is on a request's path."""


ENCODE_ONLY: tuple[Seam, ...] = (
    *(
        Seam(
            target=f"sglang.srt.model_executor.forward_batch_info:ForwardMode.{predicate}",
            kind="after",
            hook="sglang.srt.encode_only.forward_mode:counts_as_extend",
            parameters=("self", "include_draft_extend_v2"),
            process="scheduler",
            reason="An encode-only batch is prompt tokens, as an extend is.",
            upstream="`or self == ForwardMode.ENCODE_ONLY` in the predicate",
        )
        for predicate in (
            "is_extend",
            "is_context_parallel_extend",
            "is_extend_or_draft_extend_or_mixed",
        )
    ),
    Seam(
        target="sglang.srt.managers.schedule_batch:ScheduleBatch.prepare_for_extend",
        kind="around",
        hook="sglang.srt.encode_only.batch:prepare",
        parameters=("self",),
        process="scheduler",
        reason="The batch is of our mode, and needs no slots in a KV cache.",
        upstream="a method `prepare_for_encode_only` beside prepare_for_idle",
    ),
    Seam(
        target="sglang.srt.model_executor.forward_batch_info:ForwardBatch",
        kind="replace",
        hook="sglang.srt.encode_only.batch:ForwardBatch",
        process="scheduler",
        reason="The model needs to know which inputs a request holds and which layers each asks "
        "for, the attention where they end and which keys they have.",
        upstream="a field `encode_segments` of ForwardBatch, filled from `batch.reqs`; an early "
        "return in init_new",
    ),
    Seam(
        target="sglang.srt.mem_cache.kv_cache_configurator:KVCacheConfigurator"
        "._validate_prefill_only_disable_kv_cache_pool_family",
        kind="around",
        hook="sglang.srt.encode_only.batch:allow_no_kv_pool",
        parameters=("self", "is_dsa_model", "is_dsv4_model", "current_platform"),
        process="scheduler",
        reason="Upstream allows a server without KV cache on CUDA with FlashAttention only.",
        upstream="ask the attention backend whether it reads a KV pool",
    ),
    Seam(
        target="sglang.srt.mem_cache.kv_cache_configurator:KVCacheConfigurator"
        "._profile_available_bytes",
        kind="around",
        hook="sglang.srt.encode_only.batch:no_kv_budget",
        parameters=("self", "pre_model_load_memory"),
        process="scheduler",
        reason="Upstream takes as many tokens as free memory has room for in a KV cache, which "
        "there is none of: a request of more would wait for ever, and all behind it.",
        upstream="no profile with prefill_only_disable_kv_cache",
    ),
    Seam(
        target="sglang.srt.managers.scheduler:Scheduler.init_memory_pools",
        kind="after",
        hook="sglang.srt.encode_only.metrics:log_memory",
        parameters=("self",),
        process="scheduler",
        reason="The log says what an encoder takes: upstream's counts free memory, which on a host "
        "other processes change, and counts the tokens of a KV cache that is not there.",
        upstream="the same line in the method",
    ),
    Seam(
        target="sglang.srt.model_executor.model_runner_components.weight_updater"
        ":WeightUpdater.update_weights_from_disk",
        kind="around",
        hook="sglang.srt.encode_only.weights:update_or_go_back",
        parameters=(
            "self",
            "model_path",
            "load_format",
            "weight_name_filter",
            "recapture_cuda_graph",
        ),
        process="scheduler",
        reason="An update that fails ends the server: upstream goes back to what failed.",
        upstream="keep the previous model_path, and go back to that",
    ),
    Seam(
        target="sglang.srt.managers.scheduler_components.metrics_reporter"
        ":SchedulerMetricsReporter.report_prefill_stats",
        kind="before",
        hook="sglang.srt.encode_only.metrics:count_batch",
        parameters=(
            "self",
            "batch",
            "prefill_stats",
            "can_run_cuda_graph",
            "dp_cooperation_info",
        ),
        process="scheduler",
        reason="Encode-only batches have metrics of their own, and their requests many inputs.",
        upstream="label the batch counters with the forward mode",
    ),
    Seam(
        target="sglang.srt.managers.scheduler_components.ipc_channels:SchedulerIpcChannels.create",
        kind="around",
        hook="sglang.srt.encode_only.batch:send_straight_back",
        parameters=(
            "cls",
            "port_args",
            "is_rank_zero",
            "skip_tokenizer_init",
            "metrics_enabled",
            "enable_scripted_runtime",
        ),
        process="scheduler",
        reason="There is no text to detokenize; a process less for megabytes of hidden states.",
        upstream="`skip_tokenizer_init or is_embedding` where the scheduler makes its channels",
    ),
    Seam(
        target="sglang.srt.managers.tp_worker:BaseTpWorker.forward_batch_embedding",
        kind="around",
        hook="sglang.srt.encode_only.batch:forward_what_fits",
        parameters=("self", "batch"),
        process="scheduler",
        reason="A batch for which memory does not suffice ends the server, with all its callers.",
        upstream="the same in the method, for embedding models",
    ),
    Seam(
        target="sglang.srt.managers.scheduler:Scheduler.process_batch_result",
        kind="before",
        hook="sglang.srt.encode_only.outputs:hand_over",
        parameters=("self", "batch", "result"),
        process="scheduler",
        reason="Hidden states go straight into the memory of a caller on this host, who goes on "
        "while the batch is accounted for.",
        upstream="the same call at the head of the method",
    ),
    Seam(
        target="sglang.srt.managers.scheduler_components.request_receiver"
        ":SchedulerRequestReceiver._pull_raw_reqs",
        kind="after",
        hook="sglang.srt.encode_only.scheduler_line:receive",
        parameters=("self",),
        process="scheduler",
        reason="Token ids of a caller on this host reach the scheduler past HTTP and its process.",
        upstream="one more source in the method, beside the server in Rust",
    ),
    Seam(
        target="sglang.srt.managers.scheduler_components.output_streamer"
        ":SchedulerOutputStreamer._stream_output_embedding",
        kind="around",
        hook="sglang.srt.encode_only.scheduler_line:answer",
        parameters=("self", "reqs"),
        process="scheduler",
        reason="They are answered where they came from.",
        upstream="a branch, as there is for the server in Rust",
    ),
    Seam(
        target="sglang.srt.managers.scheduler:Scheduler.send_abort_output",
        kind="around",
        hook="sglang.srt.encode_only.scheduler_line:give_up",
        parameters=("self", "abort_req", "req"),
        process="scheduler",
        reason="So are those that are refused or given up.",
        upstream="a branch, as there is for the server in Rust",
    ),
    Seam(
        target="sglang.srt.managers.scheduler_components.idle_sleeper:IdleSleeper.__init__",
        kind="around",
        hook="sglang.srt.encode_only.scheduler_line:wake",
        parameters=("self", "sockets", "can_empty_cache"),
        process="scheduler",
        reason="With --sleep-on-idle, they would wait for up to a second.",
        upstream="one more descriptor in the list of sockets",
    ),
    Seam(
        target="sglang.srt.entrypoints.http_server:launch_server",
        kind="before",
        hook="sglang.srt.encode_only.launch:refuse_taken_port",
        parameters=(
            "server_args",
            "init_tokenizer_manager_func",
            "run_scheduler_process_func",
            "run_detokenizer_process_func",
            "execute_warmup_func",
            "launch_callback",
        ),
        process="server",
        reason="A server whose port is taken loads its model, and then neither serves nor ends.",
        upstream="the same check at the head of the function, for every model",
    ),
    *(
        Seam(
            target=f"sglang.srt.entrypoints.engine:Engine.{function}",
            kind="around",
            hook=f"sglang.srt.encode_only.launch:{hook}",
            parameters=parameters,
            process="server",
            reason="On a CPU the processes of a server need not import what it has imported.",
            upstream="`fork` as the start method of a CPU's platform, where the caller is a server",
        )
        for function, hook, parameters in (
            (
                "_launch_scheduler_processes",
                "forking",
                (
                    "cls",
                    "server_args",
                    "port_args",
                    "run_scheduler_process_func",
                    "placement_group",
                ),
            ),
            (
                "_launch_detokenizer_subprocesses",
                "forking_last",
                ("cls", "server_args", "port_args", "run_detokenizer_process_func"),
            ),
        )
    ),
    Seam(
        target="sglang.srt.managers.tokenizer_manager:TokenizerManager._validate_one_request",
        kind="around",
        hook="sglang.srt.encode_only.service:validate",
        parameters=("self", "obj", "input_ids"),
        process="server",
        reason="A generate request ends a server that has an embedding model; pictures beside a "
        "text are dropped in silence by one without a vision tower; the length of an input is "
        "limited, not that of a request that holds several.",
        upstream="the same check, in the same place",
    ),
    Seam(
        target="sglang.srt.managers.tokenizer_manager:TokenizerManager.update_weights_from_disk",
        kind="around",
        hook="sglang.srt.encode_only.service:update_weights",
        parameters=("self", "obj", "request"),
        process="server",
        reason="Callers who keep what was encoded are told that the weights are others.",
        upstream="a counter of updates beside the weight version, which callers have to set",
    ),
    Seam(
        target="sglang.srt.managers.tokenizer_manager:TokenizerManager.pause_generation",
        kind="around",
        hook="sglang.srt.encode_only.service:pause",
        parameters=("self", "obj"),
        process="server",
        reason="A call past HTTP could overtake the word that a server is paused.",
        upstream="an answer to that word, there",
    ),
    *(
        Seam(
            target=f"sglang.srt.managers.tokenizer_control_mixin:TokenizerControlMixin.{function}",
            kind="around",
            hook="sglang.srt.encode_only.service:refuse_sleep",
            parameters=("self", "obj", "request"),
            process="server",
            reason="Encoders are asked past what knows that memory was released, and the scheduler "
            "ends where it is taken again without having been released.",
            upstream="requests that are answered with 503 until it is resumed",
        )
        for function in ("release_memory_occupation", "resume_memory_occupation")
    ),
    *(
        Seam(
            target=f"sglang.srt.managers.tokenizer_control_mixin:TokenizerControlMixin.{function}",
            kind="around",
            hook="sglang.srt.encode_only.service:refuse_update",
            parameters=("self", "obj", "request"),
            process="server",
            reason="Weights that come a part at a time end the server: the first part lacks the "
            "rest, and prompts are taken between two of them. So do groups for them that are not "
            "there.",
            upstream="a model that says it loads weights as a whole, and a refusal by the routes",
        )
        for function in (
            "begin_weight_update",
            "end_weight_update",
            "init_weights_update_group",
            "init_weights_send_group_for_remote_instance",
            "send_weights_to_remote_instance",
            "update_weights_from_distributed",
            "update_weights_from_ipc",
            "update_weights_from_tensor",
        )
    ),
    *(
        Seam(
            target="sglang.srt.managers.scheduler_components.profiler_manager"
            f":SchedulerProfilerManager.{function}",
            kind="around",
            hook=f"sglang.srt.encode_only.metrics:{hook}",
            parameters=("self", parameter),
            process="scheduler",
            reason="A profile that cannot be made, or written, ends the server.",
            upstream="the same in the method",
        )
        for function, hook, parameter in (
            ("_profile", "profile", "recv_req"),
            ("_profile_batch_predicate", "profile_batch", "batch"),
        )
    ),
    Seam(
        target="sglang.srt.managers.tokenizer_control_mixin:TokenizerControlMixin._execute_profile",
        kind="around",
        hook="sglang.srt.encode_only.service:execute_profile",
        parameters=("self", "req"),
        process="server",
        reason="Upstream answers 500, without what went wrong.",
        upstream="the same in the routes",
    ),
    Seam(
        target="sglang.srt.managers.tokenizer_manager:TokenizerManager.configure_logging",
        kind="around",
        hook="sglang.srt.encode_only.service:configure_logging",
        parameters=("self", "obj"),
        process="server",
        reason="Requests that are logged or dumped from now on must not pass by the process that "
        "does so.",
        upstream="the same message to the scheduler, whatever was configured",
    ),
    Seam(
        target="sglang.srt.utils.auth:add_api_key_middleware",
        kind="after",
        hook="sglang.srt.encode_only.http_api:shape_refusals",
        parameters=("app", "api_key", "admin_api_key"),
        process="server",
        reason="A wrong or missing key is answered in the shape of every other error of the route.",
        upstream="OpenAI's error shape in the middleware's own answer",
    ),
    Seam(
        target="sglang.srt.entrypoints.engine:Engine.encode",
        kind="around",
        hook="sglang.srt.encode_only.engine:encode",
        parameters=(
            "self",
            "prompt",
            "image_data",
            "audio_data",
            "video_data",
            "dimensions",
            "lora_path",
            "embed_override_token_id",
            "embed_overrides",
            "external_trace_header",
            "rid",
        ),
        process="server",
        reason="The offline engine gives hidden states as tensors.",
        upstream="parameters layers, pooled, attend and skip of Engine.encode",
    ),
    Seam(
        target="sglang.srt.entrypoints.engine:Engine.async_encode",
        kind="around",
        hook="sglang.srt.encode_only.engine:async_encode",
        parameters=(
            "self",
            "prompt",
            "image_data",
            "audio_data",
            "video_data",
            "dimensions",
            "lora_path",
            "embed_override_token_id",
            "embed_overrides",
            "external_trace_header",
            "rid",
        ),
        process="server",
        reason="The same, awaited.",
        upstream="as for Engine.encode",
    ),
)
"""Installed where `is_embedding_encoder` is set, and nowhere else."""


def check(seam: Seam) -> None:
    """Raises SeamError if the installed sglang has not what `seam` expects."""
    try:
        target = pkgutil.resolve_name(seam.path)
    except (ImportError, AttributeError) as error:
        raise SeamError(_misfit(seam, f"it is not there ({error})")) from error
    if isinstance(target, type):
        if seam.kind != "replace":
            raise SeamError(_misfit(seam, "it is a class, which can only be replaced"))
        return
    if not callable(target):
        raise SeamError(_misfit(seam, f"it is a {type(target).__name__}, not a function"))
    function = inspect.unwrap(getattr(target, "__func__", target))
    found = tuple(inspect.signature(function).parameters)
    if found != seam.parameters:
        raise SeamError(
            _misfit(seam, f"it takes ({', '.join(found)}), not ({', '.join(seam.parameters)})")
        )


def _misfit(seam: Seam, what: str) -> str:
    return (
        f"sglang-encoder cannot attach to {seam.path}: {what}. This version of sglang-encoder "
        f"is for sglang {SUPPORTED_SGLANG}; install that, or leave sglang-encoder out with "
        "SGLANG_PLUGINS."
    )


def install(seams: Iterable[Seam], registry: type[HookRegistry] = HookRegistry) -> None:
    """Checks all of `seams`, then installs them; one that is installed already is left alone.

    Raises:
        SeamError: a target is gone, has other parameters, or could not be patched.
    """
    due = [seam for seam in seams if seam.path not in registry._patched]
    for seam in due:
        check(seam)
    for seam in due:
        registry.register(seam.path, _load(seam.hook), HookType(seam.kind), source=_SOURCE)
    registry.apply_hooks()
    for seam in due:
        if seam.path not in registry._patched:
            raise SeamError(_misfit(seam, "it could not be patched; the log says why"))


def _load(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)
