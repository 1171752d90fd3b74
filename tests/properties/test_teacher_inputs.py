"""What a teacher sees where it does not see the student's images: written again pixel by pixel, and its draws."""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hansfree import backgrounds
from hansfree.core import Batch, LiveTeacher, Teacher
from hansfree.errors import UserError
from hansfree.training import Training, fit

REPLACED = ("noise", "mean", "black", "recombine")
seeds = st.integers(0, 2**31 - 1)


def teacher(sees, **more):
    return LiveTeacher(torch.nn.Identity(), sees, **more)


def batch_of(count=5, size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images, mask = (torch.rand(count, c, size, size, generator=generator) for c in (3, 2))
    mask = torch.where(mask < 0.3, 0.0, torch.where(mask > 0.7, 1.0, mask))
    label = torch.zeros(count, dtype=torch.long)
    return Batch(images, label, torch.arange(count) + 100, mask=mask, clean=images.flip(0))


# What each of them shows


@settings(max_examples=30)
@given(seeds, st.sampled_from(REPLACED))
def test_the_object_stays_and_the_rest_is_replaced(seed, sees):
    batch = batch_of(seed=seed)
    seen, mask = teacher(sees).view(batch), batch.mask[:, :1].expand_as(batch.images)
    assert torch.equal(seen[mask == 1], batch.images[mask == 1])
    assert not torch.isclose(seen, batch.images)[mask == 0].all()
    assert seen.min() >= 0 and seen.max() <= 1
    black = teacher("black").view(batch)
    torch.testing.assert_close(black, batch.images * mask)
    background = (seen - black)[mask < 1] / (1 - mask[mask < 1])
    assert background.min() > -1e-5 and background.max() < 1 + 1e-5


def test_the_mean_is_the_image_s_own():
    batch = batch_of()
    seen = teacher("mean").view(batch)
    for i in range(5):
        for c in range(3):
            mean = sum(batch.images[i, c].flatten().tolist()) / 36
            m = batch.mask[i, 0]
            torch.testing.assert_close(seen[i, c], m * batch.images[i, c] + (1 - m) * mean)


def test_recombining_takes_another_image_s_background_and_none_of_its_object():
    batch, draw = batch_of(), torch.tensor([0, 1, 2, 3, 7])
    seen = teacher("recombine", drawn=lambda drawer, batch: {"background": draw}).view(batch)
    for i, number in enumerate(draw.tolist()):
        others = [j % 5 for j in range(i + 1, i + 5)]
        j = others[number % 4]
        m, around = batch.mask[i, 0], 1 - batch.mask[j, 0]
        for c in range(3):
            image = batch.images[j, c]
            mean = float((around * image).sum() / around.sum())
            behind = around * image + (1 - around) * mean
            torch.testing.assert_close(seen[i, c], m * batch.images[i, c] + (1 - m) * behind)


def test_recombining_leaves_nothing_of_a_shortcut_beside_the_object():
    mask = torch.zeros(2, 1, 4, 4)
    mask[..., :2] = 1
    images = torch.where(mask == 1, 1.0, torch.tensor([0.2, 0.7]).view(2, 1, 1, 1)).expand(2, 3, 4, 4)
    seen = teacher("recombine").view(Batch(images, torch.zeros(2).long(), torch.arange(2), mask=mask))
    torch.testing.assert_close(seen[..., 2:].mean((1, 2, 3)), torch.tensor([0.7, 0.2]))


@given(st.lists(seeds, min_size=2, max_size=9))
def test_a_partner_is_never_the_sample_itself(draws):
    chosen = backgrounds.partner(torch.tensor(draws))
    assert all(0 <= j < len(draws) and j != i for i, j in enumerate(chosen.tolist()))


def test_an_object_without_background_and_an_image_alone_have_an_answer():
    batch = batch_of(1)
    full = backgrounds.filled(batch.images, torch.ones(1, 1, 6, 6))
    torch.testing.assert_close(full, batch.images.mean((2, 3), keepdim=True).expand_as(full))
    alone, noise = teacher("recombine").view(batch), teacher("noise").view(batch)
    assert torch.equal(alone, noise)


# Noise


def test_noise_is_uniform_and_independent():
    drawn = backgrounds.noise(torch.arange(40), 3, 20, 20).double()
    assert stats.kstest(drawn.flatten().numpy(), "uniform").pvalue > 1e-3
    deviation = drawn - 0.5
    for dim in range(4):  # the next sample, channel, row and column
        product = (deviation * deviation.roll(1, dim)).mean() * 12
        assert abs(float(product)) < 5 / drawn.numel() ** 0.5
    assert drawn.flatten(1).unique(dim=0).shape[0] == 40


@given(st.lists(seeds, min_size=1, max_size=6))
def test_noise_of_a_sample_depends_on_its_seed_alone(numbers):
    together = backgrounds.noise(torch.tensor(numbers), 2, 3, 5)
    for number, sample in zip(numbers, together):
        assert torch.equal(backgrounds.noise(torch.tensor([number]), 2, 3, 5)[0], sample)


# Draws


@pytest.mark.parametrize("sees", REPLACED)
def test_without_a_method_in_training_it_is_fixed_by_index(sees):
    batch, state = batch_of(), torch.get_rng_state()
    assert torch.equal(teacher(sees).view(batch), teacher(sees).view(batch))
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_is_redrawn_in_training_and_fixed_by_index_in_validation(build, tiny):
    method = build("output-distillation", sees="noise")
    whole = tiny.split("valid").batch(torch.arange(24))
    first, second = (method.train().teacher.view(whole) for _ in range(2))
    assert not torch.equal(first, second)
    method.eval()
    parts = [method.teacher.view(tiny.split("valid").batch(index)) for index in torch.arange(24).split(7)]
    assert torch.equal(torch.cat(parts), method.teacher.view(whole))


@pytest.mark.parametrize("sees", ["clean", *REPLACED])
@pytest.mark.parametrize("name", ["output-distillation", "explanation-distillation"])
def test_the_teacher_sees_it_and_the_student_its_own_images(name, sees, build, tiny):
    plain, method = build(name).eval(), build(name, sees=sees).eval()
    batch, given_to = tiny.split("valid").batch(torch.arange(12)), []
    method.student.register_forward_pre_hook(lambda module, arguments: given_to.append(arguments[0]))
    seen = method.teacher.view(batch)
    assert torch.equal(method.teacher.logits(batch), method.teacher.model(seen))
    changed, as_before = (float(sum(m.loss(batch).values()).detach()) for m in (method, plain))
    assert changed != pytest.approx(as_before)
    assert all(torch.equal(image.detach(), batch.images) for image in given_to)


def test_resuming_draws_the_same_noise(build, tiny):
    training = Training(epochs=2, batch_size=16, optimiser="adam", lr=0.01)
    whole, saved = build("output-distillation", sees="noise"), io.BytesIO()
    for step in fit(whole, tiny, training, seed=3):
        if step.step == 2:
            torch.save(step.snapshot(), saved)
    saved.seek(0)
    resumed = build("output-distillation", sees="noise", seed=9)
    for _ in fit(resumed, tiny, training, seed=3, resume=torch.load(saved, weights_only=True)):
        pass
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


# What is refused


@pytest.mark.parametrize("sees", REPLACED)
def test_masks_are_needed_and_asked_for_in_one_sentence(sees):
    images = torch.rand(2, 3, 4, 4)
    with pytest.raises(UserError, match=f"teacher_input: {sees} needs masks.*use teacher_input: input"):
        teacher(sees).view(Batch(images, torch.zeros(2).long(), torch.arange(2)))


def test_an_unknown_input_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'noise'"):
        Teacher.live(torch.nn.Identity(), "noyse")
