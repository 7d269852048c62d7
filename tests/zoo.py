"""Small models of other libraries."""

import pytest
import torch


def transformers_models():
    t = pytest.importorskip("transformers")
    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    ids = {"input_ids": torch.randint(0, 99, (2, 7))}
    words = {"vocab_size": 100, **text}
    gpt2 = t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100)
    t5 = t.T5Config(d_model=32, d_ff=64, num_layers=2, num_heads=4, vocab_size=100, d_kv=8)
    speech = {"conv_dim": (32,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    return {
        "gpt2": (t.GPT2LMHeadModel(gpt2), ids),
        "llama": (t.LlamaForCausalLM(t.LlamaConfig(**words)), ids),
        "mixtral": (
            t.MixtralForCausalLM(t.MixtralConfig(num_local_experts=2, num_key_value_heads=4, **words)),
            ids,
        ),
        "bert": (t.BertModel(t.BertConfig(**words)), ids),
        "t5": (t.T5ForConditionalGeneration(t5), {**ids, "decoder_input_ids": ids["input_ids"]}),
        "albert": (t.AlbertModel(t.AlbertConfig(embedding_size=16, **words)), ids),
        "vit": (
            t.ViTModel(t.ViTConfig(image_size=32, patch_size=8, **text)),
            {"pixel_values": torch.randn(1, 3, 32, 32)},
        ),
        "wav2vec2": (
            t.Wav2Vec2Model(t.Wav2Vec2Config(**words, **speech)),
            {"input_values": torch.randn(1, 4000)},
        ),
    }
