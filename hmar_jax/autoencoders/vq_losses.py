"""What a tokenizer is trained on: quantizer, reconstruction, adversarial and perceptual losses.

VAR (arXiv 2404.02905) names the losses of VQGAN (arXiv 2012.09841) and published no training code; section 3.1 and equations
1 to 7 of the latter are what is computed here.
"""

import jax
import jax.numpy as jnp


def quantizer_loss(f_hats, f, beta: float):
    """Codebook and commitment loss of the residual quantizer, a mean over the scales.

    Args:
      f_hats: (K, B, S, S, Z), the running sum after each scale.
      f: (B, S, S, Z) features.
      beta: weight of the commitment term.

    Returns:
      mean over k of beta mse(sg(f_hat_k), f) + mse(f_hat_k, sg(f)).
    """
    stop = jax.lax.stop_gradient
    return beta * jnp.mean((stop(f_hats) - f) ** 2) + jnp.mean((f_hats - stop(f)) ** 2)


def straight_through(f_hat, f):
    """f_hat in the forward pass, the identity to f in the backward pass; both (B, S, S, Z)."""
    return f + jax.lax.stop_gradient(f_hat - f)
