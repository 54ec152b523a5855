"""CLIP's text encoders, with and without projection, and the text half of a whole CLIP.

A block is causal self-attention and a feed-forward layer, each behind a layer norm, with biases
everywhere. The pooled vector is the last hidden state, after the final norm, at the first
end-of-text token, projected where the checkpoint projects.

What flows between blocks is float32 whatever the model's dtype, as in `t5_encoder.py`.

Source: CLIPTextModel, CLIPTextModelWithProjection and CLIPModel of transformers; arXiv 2103.00020.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.encode_only.graphs import Graphs
from sglang.srt.encode_only.outputs import LayerCapture, States
from sglang.srt.encode_only.packing import to_device
from sglang.srt.encode_only.request import LAST_HIDDEN_STATE, EncodeSpec
from sglang.srt.encode_only.weights import Destination, load_encoder, own_sizes
from sglang.srt.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.packed_linear import (
    EPILOGUES,
    QUICK_GELU,
    SWISH,
    PackedLinearMethod,
    multiplies,
    pack_linears,
    product_dtype,
)
from sglang.srt.layers.pooler import EmbeddingPoolerOutput
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.rows import Activation, ResidualNorm
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.utils import add_prefix
from torch import nn
from transformers import PretrainedConfig

OLD_EOS_TOKEN_ID = 2
"""What configs say that were written before transformers 4.31, whatever the tokenizer's is: the
end-of-text token is then the largest id of an input."""


def layer_norm(config: PretrainedConfig, dtype: torch.dtype, scale: float = 1.0) -> ResidualNorm:
    return ResidualNorm(config.hidden_size, config.layer_norm_eps, dtype, center=True, scale=scale)


class CLIPAttention(nn.Module):
    def __init__(
        self,
        config: PretrainedConfig,
        layer_id: int,
        dtype: torch.dtype,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ):
        super().__init__()
        heads = config.num_attention_heads
        head_dim = config.hidden_size // heads
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            head_dim,
            heads,
            bias=True,
            params_dtype=dtype,
            quant_config=quant_config,
            prefix=add_prefix("qkv_proj", prefix),
        )
        self.attn = RadixAttention(
            self.qkv_proj.num_heads,
            head_dim,
            scaling=head_dim**-0.5,
            num_kv_heads=self.qkv_proj.num_heads,
            layer_id=layer_id,
            prefix=add_prefix("attn", prefix),
        )
        self.out_proj = RowParallelLinear(
            config.hidden_size,
            config.hidden_size,
            bias=True,
            params_dtype=dtype,
            quant_config=quant_config,
            prefix=add_prefix("out_proj", prefix),
        )

    def forward(self, x_th: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        qkv, _ = self.qkv_proj(x_th)
        q, k, v = qkv.chunk(3, dim=-1)
        o = self.attn(q, k, v, forward_batch, save_kv_cache=False)
        return self.out_proj(o)[0]


class CLIPFeedForward(nn.Module):
    """
    Attributes:
        scale: how many times its input what comes in has to be.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        dtype: torch.dtype,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ):
        super().__init__()
        self.fc1 = ColumnParallelLinear(
            config.hidden_size,
            config.intermediate_size,
            bias=True,
            params_dtype=dtype,
            quant_config=quant_config,
            prefix=add_prefix("fc1", prefix),
        )
        self.fc2 = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            bias=True,
            params_dtype=dtype,
            quant_config=quant_config,
            prefix=add_prefix("fc2", prefix),
        )
        self.act = Activation(config.hidden_act, dtype)
        # A CPU can activate the product as it computes it.
        quick = config.hidden_act == "quick_gelu"
        self.activated_by_fc1 = (
            (quick or config.hidden_act in EPILOGUES)
            and quant_config is None
            and torch.get_default_device().type == "cpu"
            and multiplies(dtype)
        )
        self.scale = QUICK_GELU if quick and self.activated_by_fc1 else 1.0
        if self.activated_by_fc1:
            epilogue = SWISH if quick else EPILOGUES[config.hidden_act]
            self.fc1.quant_method = PackedLinearMethod(epilogue, self.scale)
            self.fc2.quant_method = PackedLinearMethod(scale=self.scale)

    def forward(self, x_th: torch.Tensor) -> torch.Tensor:
        h, _ = self.fc1(x_th)
        out, _ = self.fc2(h if self.activated_by_fc1 else self.act(h))
        return out if self.scale == 1 else out.float() / self.scale


class CLIPBlock(nn.Module):
    def __init__(
        self,
        config: PretrainedConfig,
        layer_id: int,
        dtype: torch.dtype,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ):
        super().__init__()
        self.layer_norm1 = layer_norm(config, dtype)
        self.self_attn = CLIPAttention(
            config, layer_id, dtype, quant_config, add_prefix("self_attn", prefix)
        )
        self.mlp = CLIPFeedForward(config, dtype, quant_config, add_prefix("mlp", prefix))
        self.layer_norm2 = layer_norm(config, dtype, self.mlp.scale)

    def forward(
        self, x_th: torch.Tensor, delta_th: torch.Tensor | None, forward_batch: ForwardBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As of T5Block."""
        x_th, h_th = self.layer_norm1(x_th, delta_th)
        x_th, h_th = self.layer_norm2(x_th, self.self_attn(h_th, forward_batch))
        return x_th, self.mlp(h_th)


class CLIPTextModel(nn.Module):
    """CLIP's text encoder; hidden states are `[tokens, hidden_size]` in the model's dtype.

    Args:
        config: a CLIPTextConfig, or a CLIPConfig that has one.

    Raises:
        ValueError: the ranks cannot share the heads or the feed-forward width.
    """

    projects = False
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}  # noqa: RUF012

    def __init__(
        self,
        config: PretrainedConfig,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__()
        # Of a CLIPConfig its own, whatever its text config says.
        projection_dim = config.projection_dim
        config = own_sizes(config)
        config.projection_dim = projection_dim
        self.config = config
        self.quant_config = quant_config
        self.dtype = torch.get_default_dtype()
        dtype = self.dtype
        if quant_config is None:
            dtype = product_dtype(dtype, torch.get_default_device().type)
        self.token_embedding = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(
            CLIPBlock(
                config,
                i,
                dtype,
                quant_config,
                add_prefix(f"text_model.encoder.layers.{i}", prefix),
            )
            for i in range(config.num_hidden_layers)
        )
        self.final_norm = layer_norm(config, torch.float32)
        self.text_projection: nn.Linear | None = None
        if self.projects:
            self.text_projection = nn.Linear(
                config.hidden_size, config.projection_dim, bias=False, dtype=torch.float32
            )
        self.graphs = Graphs(
            self.offer_states,
            self.blocks,
            quantized=quant_config is not None,
            max_length=config.max_position_embeddings,
        )
        pack_linears(self)

    def get_input_embeddings(self) -> nn.Module:
        return self.token_embedding

    @torch.no_grad()
    def prepare_before_cuda_graph_capture(self, model_runner: Any) -> None:
        """Called by srt's model runner on a GPU, before it serves."""
        # As FLUX.1 asks, and as Stable Diffusion XL and 3.
        usual = [EncodeSpec(layers=layers, pooled=True) for layers in ((), (-2,))]
        self.graphs.prepare(model_runner, usual)

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
        get_embedding: bool = True,
    ) -> EmbeddingPoolerOutput:
        capture = LayerCapture(forward_batch, self.config.num_hidden_layers)
        if input_embeds is None:
            self.graphs.run(capture, input_ids, positions, forward_batch)
        else:
            self.offer_states(capture, input_ids, positions, forward_batch, input_embeds)
        pooled = None
        if capture.to_pool is not None:
            ends = end_of_text(input_ids, capture.lengths, self.config.eos_token_id)
            pooled = capture.to_pool[ends]
            if self.text_projection is not None:
                pooled = self.text_projection(pooled)
            pooled = pooled.to(self.dtype)
        return capture.finish(pooled=pooled, embeddings=pooled)

    def offer_states(
        self,
        to: States,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
    ) -> None:
        """Runs as many blocks as have to run for what `to` wants, and offers it their states."""
        tokens = self.token_embedding(input_ids) if input_embeds is None else input_embeds
        x_th = tokens.float() + self.position_embedding(positions).float()
        delta_th = None
        for layer, block in enumerate(self.blocks[: to.last_block]):
            self._offer(to, layer, x_th, delta_th)
            x_th, delta_th = block(x_th, delta_th, forward_batch)
        self._offer(to, to.last_block, x_th, delta_th)
        if to.wants_last:
            _, x_th = self.final_norm(x_th, delta_th)
            to.offer(LAST_HIDDEN_STATE, x_th.to(self.dtype))
            if to.wants_pooled:
                to.to_pool = x_th

    def _offer(
        self, to: States, layer: int, x_th: torch.Tensor, delta_th: torch.Tensor | None
    ) -> None:
        if to.wants(layer):
            # The next block writes into x.
            state_th = x_th.clone() if delta_th is None else x_th + delta_th
            to.offer(layer, state_th.to(self.dtype))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Takes the text encoder's weights by their names in transformers, and counts the others.

        Raises:
            ValueError: a weight is missing or has another shape than the config describes.
        """
        load_encoder(
            weights,
            self._destinations(),
            quantized=self.quant_config is not None,
            part_of="text_model",
            # A text model alone has been saved with and without.
            rename=lambda name: name.removeprefix("text_model."),
        )

    def _destinations(self) -> dict[str, Destination]:
        """By the name of the weight in the checkpoint."""
        config = self.config
        hidden, inner = config.hidden_size, config.intermediate_size
        to = {
            "embeddings.token_embedding.weight": Destination(
                self.token_embedding, (config.vocab_size, hidden)
            ),
            "embeddings.position_embedding.weight": Destination(
                self.position_embedding, (config.max_position_embeddings, hidden)
            ),
        }
        for part in ("weight", "bias"):
            to[f"final_layer_norm.{part}"] = Destination(self.final_norm, (hidden,))
        if self.text_projection is not None:
            to["text_projection.weight"] = Destination(
                self.text_projection, (config.projection_dim, hidden)
            )
        for i, block in enumerate(self.blocks):
            linears = {
                **{
                    f"self_attn.{x}_proj": (block.self_attn.qkv_proj, hidden, hidden, x)
                    for x in "qkv"
                },
                "self_attn.out_proj": (block.self_attn.out_proj, hidden, hidden, None),
                "mlp.fc1": (block.mlp.fc1, inner, hidden, None),
                "mlp.fc2": (block.mlp.fc2, hidden, inner, None),
            }
            for name, (module, outputs, inputs, shard) in linears.items():
                name = f"encoder.layers.{i}.{name}"
                to[f"{name}.weight"] = Destination(module, (outputs, inputs), shard)
                to[f"{name}.bias"] = Destination(module, (outputs,), shard)
            for norm in ("layer_norm1", "layer_norm2"):
                for part in ("weight", "bias"):
                    to[f"encoder.layers.{i}.{norm}.{part}"] = Destination(
                        getattr(block, norm), (hidden,)
                    )
        return to


class CLIPTextModelWithProjection(CLIPTextModel):
    """Its pooled vector is projected. Also the text half of a CLIPModel."""

    projects = True


def end_of_text(input_ids: torch.Tensor, lengths: list[int], eos_token_id: int) -> torch.Tensor:
    """`[inputs]` int64, the row of each packed input's first end-of-text token.

    As transformers has it, an input without one is pooled at its first token.

    Args:
        input_ids: `[tokens]`, of all inputs, end to end.
        lengths: of each input.
        eos_token_id: of the config; OLD_EOS_TOKEN_ID for the largest id.
    """
    rows = nn.utils.rnn.pad_sequence(
        list(input_ids.split(lengths)), batch_first=True, padding_value=-1
    )
    if eos_token_id != OLD_EOS_TOKEN_ID:
        rows = (rows == eos_token_id).int()
    starts = [0, *itertools.accumulate(lengths[:-1])]
    return rows.argmax(dim=1) + to_device(starts, torch.int64, input_ids.device)


EntryClass = [CLIPTextModel, CLIPTextModelWithProjection]
