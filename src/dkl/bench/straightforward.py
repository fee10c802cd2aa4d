"""Training steps written the obvious way, as published scripts do them: what ours is timed against.

Nothing here is for use in training. Every habit is one of a published script for IKL, TRADES-AWP or
PGD adversarial training: the pairwise [B, C, C] loss (Algorithm 1 of arXiv 2305.13948), clean
logits computed anew at every step of the attack with their graph, a second model for the weight
perturbation, a one-hot matrix product for the class statistics, loops over single parameters.

Shapes: B samples, C classes.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Noise = Callable[[Tensor], Tensor]
"""Images to standard normal numbers of their shape."""


@dataclass(frozen=True)
class StepNumbers:
    """The numbers of a training step, for both sides; defaults are those of IKL-AT on CIFAR-100.

    Args:
        mse_weight: of the weighted MSE.
        ce_weight: of the soft cross-entropy.
        temperature: of the soft cross-entropy in distillation.
        weight_temperature: of the class statistics.
        eps: radius of the attack, Linf.
        step_size: of the attack.
        num_steps: of the attack.
        start_std: deviation of the noise that the attack starts with.
        awp_gamma: relative size of the weight perturbation; 0: none.
        learning_rate: of SGD.
        momentum: of SGD, without Nesterov's.
        weight_decay: of SGD.
        average_decay: of the weights' moving average after every step; 0: none is kept.
    """

    mse_weight: float = 20.0
    ce_weight: float = 4.0
    temperature: float = 1.0
    weight_temperature: float = 4.0
    eps: float = 8 / 255
    step_size: float = 2 / 255
    num_steps: int = 5
    start_std: float = 0.001
    awp_gamma: float = 0.005
    learning_rate: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    average_decay: float = 0.9996


def pairwise_ikl(
    input_BC: Tensor,
    target_BC: Tensor,
    weights_BC: Tensor,
    *,
    mse_weight: float = 1.0,
    ce_weight: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """Return the IKL loss by Algorithm 1: every pair of classes, [B, C, C] tensors.

    Args:
        input_BC: logits of the prediction.
        target_BC: logits of the reference; its soft label is detached.
        weights_BC: class weights of every sample.
        mse_weight: a, of the weighted MSE with its factor 1/4.
        ce_weight: b, of the soft cross-entropy.
        temperature: T of the soft cross-entropy.

    Returns:
        The mean over samples, with gradients to input and target.

    Example:
        >>> weights = torch.full((1, 2), 0.5)
        >>> pairwise_ikl(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]), weights).item()
        1.193...
    """
    target_BCC = target_BC[:, :, None] - target_BC[:, None, :]
    input_BCC = input_BC[:, :, None] - input_BC[:, None, :]
    weights_BCC = weights_BC[:, :, None] * weights_BC[:, None, :]
    mse = (weights_BCC * (target_BCC - input_BCC) ** 2).sum(dim=(1, 2)).mean() / 4
    label_BC = F.softmax(target_BC.detach() / temperature, dim=1)
    ce = -(label_BC * F.log_softmax(input_BC / temperature, dim=1)).sum(dim=1).mean()
    return mse_weight * mse + ce_weight * ce


class _Script:
    """What adversarial training and distillation share: optimiser, class statistics, average."""

    def __init__(self, model: nn.Module, table_CC: Tensor, numbers: StepNumbers) -> None:
        self.model = model.train()
        self.numbers = numbers
        self.table_CC = table_CC
        self.sums_CC = torch.zeros_like(table_CC)
        self.optimizer = torch.optim.SGD(
            model.parameters(),
            lr=numbers.learning_rate,
            momentum=numbers.momentum,
            weight_decay=numbers.weight_decay,
            foreach=False,
        )
        self.average = copy.deepcopy(model).eval() if numbers.average_decay > 0 else None

    def _one_hot(self, labels_B: Tensor) -> Tensor:
        return F.one_hot(labels_B, len(self.table_CC)).to(self.table_CC.dtype)

    def _observe(self, reference_BC: Tensor, labels_B: Tensor) -> None:
        with torch.no_grad():
            probs_BC = F.softmax(reference_BC / self.numbers.weight_temperature, dim=1)
            self.sums_CC += self._one_hot(labels_B).t() @ probs_BC

    def _update_average(self) -> None:
        if self.average is None:
            return
        decay, current = self.numbers.average_decay, self.model.state_dict()
        with torch.no_grad():
            for name, value in self.average.state_dict().items():
                if value.is_floating_point():
                    value.mul_(decay).add_(current[name], alpha=1 - decay)
                else:
                    value.copy_(current[name])


class AdversarialScript(_Script):
    """A step of IKL adversarial training, with the weight perturbation (AWP) or without.

    Args:
        model: trained in place.
        table_CC: class weights, a row per label.
        numbers: of the step.
        parameter_gradients: the attack calls ``backward``, as scripts for PGD training do, so that
            gradients of all parameters are made and thrown away at each of its steps; False: it
            asks for the gradient of the images alone, as scripts for TRADES do.
        noise: where attacks start; None takes torch's generator.
    """

    def __init__(
        self,
        model: nn.Module,
        table_CC: Tensor,
        numbers: StepNumbers,
        *,
        parameter_gradients: bool = True,
        noise: Noise | None = None,
    ) -> None:
        super().__init__(model, table_CC, numbers)
        self.parameter_gradients = parameter_gradients
        self.noise = noise or torch.randn_like
        self._proxy = copy.deepcopy(model)
        # Its learning rate cancels out: only the direction of its step is used.
        self._proxy_optimizer = torch.optim.SGD(self._proxy.parameters(), lr=0.01, foreach=False)

    def __call__(self, images: Tensor, labels_B: Tensor) -> None:
        """Take a step: attack, perturbation, update, average."""
        self.update(images, self.attack(images, labels_B), labels_B)

    def update(self, images: Tensor, adversarial: Tensor, labels_B: Tensor) -> None:
        """Take what remains of a step once the adversarial images are there."""
        weights_BC = self._one_hot(labels_B) @ self.table_CC
        differences = {}
        if self.numbers.awp_gamma > 0:
            differences = self._perturbation(images, adversarial, labels_B, weights_BC)
            self._shift(differences, 1.0)
        self.optimizer.zero_grad()
        loss, clean_BC = self._loss(self.model, images, adversarial, labels_B, weights_BC)
        torch.autograd.backward(loss)
        self._observe(clean_BC, labels_B)
        self.optimizer.step()
        self._shift(differences, -1.0)
        self._update_average()

    def attack(self, images: Tensor, labels_B: Tensor) -> Tensor:
        """Return adversarial images."""
        numbers, model = self.numbers, self.model
        weights_BC = self._one_hot(labels_B) @ self.table_CC
        model.eval()
        adversarial = images.detach() + numbers.start_std * self.noise(images)
        for _ in range(numbers.num_steps):
            adversarial.requires_grad_()
            loss = pairwise_ikl(model(adversarial), model(images), weights_BC)
            if self.parameter_gradients:
                torch.autograd.backward(loss)
                gradient = adversarial.grad
            else:
                gradient = torch.autograd.grad(loss, [adversarial])[0]
            if gradient is None:
                raise RuntimeError("the attack found no gradient")
            moved = adversarial.detach() + numbers.step_size * torch.sign(gradient)
            moved = torch.max(torch.min(moved, images + numbers.eps), images - numbers.eps)
            adversarial = torch.clamp(moved, 0.0, 1.0)
        model.train()
        return adversarial.detach()

    def _loss(
        self,
        model: nn.Module,
        images: Tensor,
        adversarial: Tensor,
        labels_B: Tensor,
        weights_BC: Tensor,
    ) -> tuple[Tensor, Tensor]:
        adversarial_BC, clean_BC = model(adversarial), model(images)
        numbers = self.numbers
        robust = pairwise_ikl(
            adversarial_BC,
            clean_BC,
            weights_BC,
            mse_weight=numbers.mse_weight,
            ce_weight=numbers.ce_weight,
        )
        return F.cross_entropy(clean_BC, labels_B) + robust, clean_BC

    def _perturbation(
        self, images: Tensor, adversarial: Tensor, labels_B: Tensor, weights_BC: Tensor
    ) -> dict[str, Tensor]:
        """Let a copy of the model take a step that raises the loss; return the scaled change."""
        proxy = self._proxy
        proxy.load_state_dict(self.model.state_dict())
        proxy.train()
        loss, _ = self._loss(proxy, images, adversarial, labels_B, weights_BC)
        self._proxy_optimizer.zero_grad()
        torch.autograd.backward(-loss)
        self._proxy_optimizer.step()
        before, after, scaled = self.model.state_dict(), proxy.state_dict(), {}
        for name, weight in before.items():
            if "weight" in name and weight.ndim > 1:
                change = after[name] - weight
                scaled[name] = weight.norm() / (change.norm() + 1e-20) * change
        return scaled

    def _shift(self, differences: dict[str, Tensor], sign: float) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in differences:
                    parameter.add_(differences[name], alpha=sign * self.numbers.awp_gamma)


class DistillationScript(_Script):
    """A step of IKL distillation from a frozen teacher.

    Args:
        student: trained in place.
        teacher: asked for its logits, in eval mode.
        table_CC: class weights, a row per label.
        numbers: of the step.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, table_CC: Tensor, numbers: StepNumbers
    ) -> None:
        super().__init__(student, table_CC, numbers)
        self.teacher = teacher.eval()

    def __call__(self, images: Tensor, labels_B: Tensor) -> None:
        """Take a step."""
        student_BC = self.model(images)
        with torch.no_grad():
            teacher_BC = self.teacher(images)
        soft = pairwise_ikl(
            student_BC,
            teacher_BC,
            self._one_hot(labels_B) @ self.table_CC,
            mse_weight=self.numbers.mse_weight,
            ce_weight=self.numbers.ce_weight,
            temperature=self.numbers.temperature,
        )
        loss = F.cross_entropy(student_BC, labels_B) + soft
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self._observe(teacher_BC, labels_B)
        self.optimizer.step()
        self._update_average()
