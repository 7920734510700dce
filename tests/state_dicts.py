"""Small state dicts with the published names, of random numbers; they need no torch."""

import numpy as np

SIDES = (1, 2)


def tokenizer_state(sides=SIDES, vocab=16, z=4, channels=32, seed=0) -> dict[str, np.ndarray]:
    """VAR's tokenizer with one level, one residual block and one phi."""
    rng = np.random.default_rng(seed)
    state = {"quantize.embedding.weight": rng.normal(size=(vocab, z))}
    state["quantize.ema_vocab_hit_SV"] = np.zeros((len(sides), vocab))

    def conv(name, inputs, outputs, size=3):
        state[f"{name}.weight"] = rng.normal(size=(outputs, inputs, size, size)) * 0.1
        state[f"{name}.bias"] = rng.normal(size=(outputs,)) * 0.1

    def block(name):
        for i in (1, 2):
            state[f"{name}.norm{i}.weight"] = np.ones(channels)
            state[f"{name}.norm{i}.bias"] = np.zeros(channels)
            conv(f"{name}.conv{i}", channels, channels)

    for part, (first, last) in {"encoder": (3, z), "decoder": (z, 3)}.items():
        conv(f"{part}.conv_in", first, channels)
        conv(f"{part}.conv_out", channels, last)
        state[f"{part}.norm_out.weight"] = np.ones(channels)
        state[f"{part}.norm_out.bias"] = np.zeros(channels)
        for i in (1, 2):
            block(f"{part}.mid.block_{i}")
    block("encoder.down.0.block.0")
    block("decoder.up.0.block.0")
    block("decoder.up.0.block.1")
    conv("quant_conv", z, z)
    conv("post_quant_conv", z, z)
    conv("quantize.quant_resi.qresi", z, z)
    return {name: x.astype(np.float32) for name, x in state.items()}


def transformer_state(
    sides=SIDES, vocab=16, z=4, depth=2, width=8, heads=2, classes=3, causal=False, seed=1
) -> dict[str, np.ndarray]:
    """Stage 1 of HMAR, or VAR (causal)."""
    rng = np.random.default_rng(seed)
    length, state = sum(s * s for s in sides), {}

    def linear(name, inputs, outputs):
        state[f"{name}.weight"] = rng.normal(size=(outputs, inputs)) * 0.1
        state[f"{name}.bias"] = rng.normal(size=(outputs,)) * 0.1

    for name, shape in {
        "pos_1LC": (1, length, width),
        "pos_start": (1, sides[0] ** 2, width),
        "lvl_embed.weight": (len(sides), width),
        "class_emb.weight": (classes + 1, width),
    }.items():
        state[name] = rng.normal(size=shape)
    linear("word_embed", z, width)
    for i in range(depth):
        block = f"blocks.{i}"
        state[f"{block}.attn.scale_mul_1H11"] = np.ones((1, heads, 1, 1))
        state[f"{block}.attn.mat_qkv.weight"] = rng.normal(size=(3 * width, width)) * 0.1
        state[f"{block}.attn.q_bias"] = rng.normal(size=(width,))
        state[f"{block}.attn.v_bias"] = rng.normal(size=(width,))
        linear(f"{block}.attn.proj", width, width)
        linear(f"{block}.ffn.fc1", width, 4 * width)
        linear(f"{block}.ffn.fc2", 4 * width, width)
        linear(f"{block}.ada_lin.1", width, 6 * width)
    linear("head_nm.ada_lin.1", width, 2 * width)
    linear("head", width, vocab)
    if causal:
        level = np.repeat(np.arange(len(sides)), [s * s for s in sides])
        bias = np.where(level[:, None] >= level[None], 0, -np.inf)
        state["attn_bias_for_masking"] = bias[None, None]
    return {name: x.astype(np.float32) for name, x in state.items()}
