"""A discriminator tells what is real from what a network made; the network learns to deceive it.

Goodfellow et al. 2014, "Generative Adversarial Networks" (arXiv 1406.2661). D is the sigmoid of the
discriminator's logits. Each side takes a step of its own, which a method declares as a phase
(`Method.phases`): in the discriminator's phase the other side's gradient is cut off.
"""

from torch import Tensor
from torch.nn import functional as F


def discriminator_loss(real: Tensor, generated: Tensor) -> Tensor:
    """-E[log D(real)] - E[log(1 - D(generated))] of logits of any shape: eq. 1, negated.

    What the discriminator minimises; a float32 scalar in nats. Each kind is averaged by itself, so
    there may be more of one.
    """
    return F.softplus(-real.float()).mean() + F.softplus(generated.float()).mean()


def deception_loss(generated: Tensor) -> Tensor:
    """-E[log D(generated)] of logits of any shape: a float32 scalar in nats.

    What the generating network minimises, in the non-saturating form of section 3: it keeps its
    gradient where the discriminator is sure.
    """
    return F.softplus(-generated.float()).mean()
