"""The encoders of T5, MT5 and UMT5, and of their encoder-decoder checkpoints.

A block is self-attention and a feed-forward layer, each behind a norm that only scales; there are
no biases but one: attention scores, which are not divided by anything, get a learned value for the
distance between two tokens. T5 and MT5 share block 0's table of them, UMT5 has one in every block.

What flows between blocks is float32 whatever the model's dtype: T5's hidden states outgrow
float16, and rounding them twice a block is most of the error of a bfloat16 forward pass.

Source: T5EncoderModel, MT5EncoderModel and UMT5EncoderModel of transformers; arXiv 1910.10683.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, cast

import torch
from sglang.srt.encode_only.graphs import Graphs
from sglang.srt.encode_only.outputs import LayerCapture, States
from sglang.srt.encode_only.request import LAST_HIDDEN_STATE, EncodeSpec
from sglang.srt.encode_only.weights import Destination, load_encoder
from sglang.srt.layers.attention.encode_only.bias import RelativePositionBias
from sglang.srt.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from sglang.srt.layers.packed_linear import (
    EPILOGUES,
    PackedLinearMethod,
    multiplies,
    pack_linears,
    product_dtype,
)
from sglang.srt.layers.pooler import EmbeddingPoolerOutput
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.layers.rows import Activation, ResidualNorm, within_range
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils import add_prefix
from torch import nn
from transformers import PretrainedConfig

logger = logging.getLogger(__name__)


def sums_in_float32(device: str) -> bool:
    """Whether a device of this type gives products of float16 as it adds them up, in float32."""
    return device == "cuda" and torch.version.cuda is not None


class Float32OutputLinearMethod(UnquantizedLinearMethod):
    """Stands in for the unquantized method of a linear layer whose products outgrow float16."""

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`[tokens, outputs]` float32, of `[tokens, inputs of the rank]` in the weight's dtype."""
        assert bias is None, "A product in float32 with a bias. This is a bug."
        return torch.mm(x, layer.weight.T, out_dtype=torch.float32)


class T5Attention(nn.Module):
    def __init__(
        self,
        config: PretrainedConfig,
        position_bias: RelativePositionBias,
        layer_id: int,
        dtype: torch.dtype,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ):
        super().__init__()
        self.qkv = QKVParallelLinear(
            config.d_model,
            config.d_kv,
            config.num_heads,
            bias=False,
            params_dtype=dtype,
            quant_config=quant_config,
            prefix=add_prefix("qkv", prefix),
        )
        self.position_bias = position_bias
        self.attn = RadixAttention(
            self.qkv.num_heads,
            config.d_kv,
            scaling=1.0,
            num_kv_heads=self.qkv.num_heads,
            layer_id=layer_id,
            attn_type=AttentionType.ENCODER_ONLY,
            prefix=add_prefix("attn", prefix),
        )
        self.o = RowParallelLinear(
            config.num_heads * config.d_kv,
            config.d_model,
            bias=False,
            params_dtype=dtype,
            quant_config=quant_config,
            prefix=add_prefix("o", prefix),
        )

    def forward(self, x_th: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        qkv, _ = self.qkv(x_th)
        q, k, v = qkv.chunk(3, dim=-1)
        o = self.attn(q, k, v, forward_batch, save_kv_cache=False, position_bias=self.position_bias)
        o, _ = self.o(o)
        return within_range(o, o.dtype)


class T5FeedForward(nn.Module):
    def __init__(
        self,
        config: PretrainedConfig,
        dtype: torch.dtype,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ):
        super().__init__()
        self.gated = config.is_gated_act
        if self.gated:
            self.wi = MergedColumnParallelLinear(
                config.d_model,
                [config.d_ff, config.d_ff],
                bias=False,
                params_dtype=dtype,
                quant_config=quant_config,
                prefix=add_prefix("wi", prefix),
            )
        else:
            self.wi = ColumnParallelLinear(
                config.d_model,
                config.d_ff,
                bias=False,
                params_dtype=dtype,
                quant_config=quant_config,
                prefix=add_prefix("wi", prefix),
            )
        # This product is where T5 outgrows float16. The reference holds its weight in float32,
        # whose products a GPU computes several times slower than it adds up those of float16.
        device = torch.get_default_device().type
        outgrows = dtype == torch.float16 and quant_config is None
        gives_fp32 = outgrows and sums_in_float32(device)
        self.wo_dtype = torch.float32 if outgrows and not gives_fp32 else dtype
        self.wo = RowParallelLinear(
            config.d_ff,
            config.d_model,
            bias=False,
            params_dtype=self.wo_dtype,
            quant_config=quant_config,
            prefix=add_prefix("wo", prefix),
        )
        if gives_fp32:
            self.wo.quant_method = Float32OutputLinearMethod()
        self.act = Activation(config.dense_act_fn, self.wo_dtype, gated=self.gated)
        # A CPU can activate, and gate, the product as it computes it.
        self.activated_by_wi = (
            config.dense_act_fn in EPILOGUES
            and quant_config is None
            and device == "cpu"
            and multiplies(dtype)
            and self.wo_dtype == dtype
        )
        if self.activated_by_wi:
            self.wi.quant_method = PackedLinearMethod(EPILOGUES[config.dense_act_fn])

    def forward(self, x_th: torch.Tensor) -> torch.Tensor:
        h, _ = self.wi(x_th)
        if not self.activated_by_wi:
            h = self.act(h)
        out, _ = self.wo(h)
        # A quantized wo gives float16.
        return within_range(out, out.dtype)


class T5Block(nn.Module):
    def __init__(
        self,
        config: PretrainedConfig,
        position_bias: RelativePositionBias,
        layer_id: int,
        dtype: torch.dtype,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ):
        super().__init__()
        width, eps = config.d_model, config.layer_norm_epsilon
        self.attention_norm = ResidualNorm(width, eps, dtype)
        self.attention = T5Attention(
            config,
            position_bias,
            layer_id,
            dtype,
            quant_config,
            add_prefix("layer.0.SelfAttention", prefix),
        )
        self.feed_forward_norm = ResidualNorm(width, eps, dtype)
        self.feed_forward = T5FeedForward(
            config, dtype, quant_config, add_prefix("layer.1.DenseReluDense", prefix)
        )

    def forward(
        self, x_th: torch.Tensor, delta_th: torch.Tensor | None, forward_batch: ForwardBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The state before a block, and after it, is the sum of the two: x is float32, delta what
        the last layer gave, if there was one."""
        x_th, h_th = self.attention_norm(x_th, delta_th)
        x_th, h_th = self.feed_forward_norm(x_th, self.attention(h_th, forward_batch))
        return x_th, self.feed_forward(h_th)


class T5EncoderModel(nn.Module):
    """T5's encoder; its hidden states are `[tokens, d_model]` in the model's dtype.

    Raises:
        ValueError: the heads or the feed-forward width cannot be split between the ranks.
    """

    bias_in_every_block = False
    packed_modules_mapping = {"qkv": ["q", "k", "v"], "wi": ["wi_0", "wi_1"]}  # noqa: RUF012

    def __init__(
        self,
        config: PretrainedConfig,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__()
        # On a CPU, srt adds heads to a number that the ranks do not divide.
        heads = getattr(config, "original_num_attention_heads", config.num_heads)
        tp_size = get_parallel().tp_size
        for field, size in (("num_heads", heads), ("d_ff", config.d_ff)):
            if size % tp_size:
                raise ValueError(
                    f"{field} is {size}, which --tp-size {tp_size} does not divide; "
                    "give a size that does."
                )
        self.config = config
        self.quant_config = quant_config
        self.dtype = torch.get_default_dtype()
        dtype = self.dtype
        if quant_config is None:
            dtype = product_dtype(dtype, torch.get_default_device().type)
        if dtype != self.dtype:
            logger.info(
                "Weights are held in %s: this CPU multiplies no %s.",
                *(str(x).removeprefix("torch.") for x in (dtype, self.dtype)),
            )
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList()
        position_bias = None
        for i in range(config.num_layers):
            if position_bias is None or self.bias_in_every_block:
                position_bias = RelativePositionBias(
                    config.relative_attention_num_buckets,
                    config.relative_attention_max_distance,
                    config.num_heads,
                )
            block_prefix = add_prefix(f"encoder.block.{i}", prefix)
            self.blocks.append(T5Block(config, position_bias, i, dtype, quant_config, block_prefix))
        self.final_norm = ResidualNorm(config.d_model, config.layer_norm_epsilon, torch.float32)
        self.graphs = Graphs(self.offer_states, self.blocks, quantized=quant_config is not None)
        pack_linears(self)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    @torch.no_grad()
    def prepare_before_cuda_graph_capture(self, model_runner: Any) -> None:
        """Called by srt's model runner on a GPU, before it serves."""
        self.graphs.prepare(model_runner, [EncodeSpec()])

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
        get_embedding: bool = True,
    ) -> EmbeddingPoolerOutput:
        capture = LayerCapture(forward_batch, self.config.num_layers)
        if input_embeds is None:
            self.graphs.run(capture, input_ids, positions, forward_batch)
        else:
            self.offer_states(capture, input_ids, positions, forward_batch, input_embeds)
        return capture.finish()

    def offer_states(
        self,
        to: States,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
    ) -> None:
        """Runs as many blocks as have to run for what `to` wants, and offers it their states."""

        def offer(layer: int, x_th: torch.Tensor, delta_th: torch.Tensor | None = None) -> None:
            if to.wants(layer):
                # The next block writes into x.
                state_th = x_th.clone() if delta_th is None else x_th + delta_th
                to.offer(layer, within_range(state_th, self.dtype))

        embeds_th = self.embed_tokens(input_ids) if input_embeds is None else input_embeds.clone()
        x_th = embeds_th.float()
        delta_th = None
        offer(0, x_th)
        for layer, block in enumerate(self.blocks[: to.last_block], start=1):
            x_th, delta_th = block(x_th, delta_th, forward_batch)
            if layer < len(self.blocks):
                offer(layer, x_th, delta_th)
        if to.last_block == len(self.blocks):
            _, x_th = self.final_norm(x_th, delta_th)
            offer(len(self.blocks), x_th)
            offer(LAST_HIDDEN_STATE, x_th)

    def _destinations(self) -> dict[str, Destination]:
        """By the name of the weight in the checkpoint."""
        config = self.config
        hidden, inner = config.d_model, config.num_heads * config.d_kv
        to = {
            "encoder.embed_tokens.weight": Destination(
                self.embed_tokens, (config.vocab_size, hidden)
            ),
            "encoder.final_layer_norm.weight": Destination(self.final_norm, (hidden,)),
        }
        for i, block in enumerate(cast("Iterable[T5Block]", self.blocks)):
            attention, feed_forward = block.attention, block.feed_forward
            first, second = (f"encoder.block.{i}.layer.{half}" for half in (0, 1))
            to[f"{first}.layer_norm.weight"] = Destination(block.attention_norm, (hidden,))
            to[f"{second}.layer_norm.weight"] = Destination(block.feed_forward_norm, (hidden,))
            for x in "qkv":
                name = f"{first}.SelfAttention.{x}.weight"
                to[name] = Destination(attention.qkv, (inner, hidden), x)
            to[f"{first}.SelfAttention.o.weight"] = Destination(attention.o, (hidden, inner))
            if i == 0 or self.bias_in_every_block:
                bias = attention.position_bias
                to[f"{first}.SelfAttention.relative_attention_bias.weight"] = Destination(
                    bias, (bias.num_buckets, config.num_heads)
                )
            for shard, x in enumerate(("wi_0", "wi_1")) if feed_forward.gated else ((None, "wi"),):
                name = f"{second}.DenseReluDense.{x}.weight"
                to[name] = Destination(feed_forward.wi, (config.d_ff, hidden), shard)
            name = f"{second}.DenseReluDense.wo.weight"
            to[name] = Destination(feed_forward.wo, (hidden, config.d_ff))
            for x, param in feed_forward.act.function.named_parameters():
                name = f"{second}.DenseReluDense.act.{x}"
                to[name] = Destination(feed_forward.act.function, tuple(param.shape))
        return to

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Takes the encoder's weights by their names in transformers, and counts the others.

        Raises:
            ValueError: a weight is missing or has another shape than the config describes.
        """
        destinations = self._destinations()
        own = "encoder.embed_tokens.weight"
        seen: set[str] = set()

        def rename(name: str) -> str:
            seen.add(name)
            # The encoder's own embedding, should the checkpoint have both, replaces it.
            return own if name == "shared.weight" and own not in seen else name

        load_encoder(
            weights,
            destinations,
            quantized=self.quant_config is not None,
            part_of="encoder",
            rename=rename,
        )


class MT5EncoderModel(T5EncoderModel):
    """T5 by another name."""


class UMT5EncoderModel(T5EncoderModel):
    """T5 with a table of position biases in every block."""

    bias_in_every_block = True


class T5ForConditionalGeneration(T5EncoderModel):
    """The encoder of a checkpoint with a decoder and a head."""


class MT5ForConditionalGeneration(MT5EncoderModel):
    """The encoder of a checkpoint with a decoder and a head."""


class UMT5ForConditionalGeneration(UMT5EncoderModel):
    """The encoder of a checkpoint with a decoder and a head."""


class T5Model(T5EncoderModel):
    """The encoder of a checkpoint with a decoder."""


class MT5Model(MT5EncoderModel):
    """The encoder of a checkpoint with a decoder."""


class UMT5Model(UMT5EncoderModel):
    """The encoder of a checkpoint with a decoder."""


EntryClass = [
    T5EncoderModel,
    MT5EncoderModel,
    UMT5EncoderModel,
    T5ForConditionalGeneration,
    MT5ForConditionalGeneration,
    UMT5ForConditionalGeneration,
    T5Model,
    MT5Model,
    UMT5Model,
]
