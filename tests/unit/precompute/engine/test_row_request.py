"""Requests and scores survive the way between front end and workers; draws are a function of the seed."""

from types import SimpleNamespace

import numpy as np

from precompute.engine.row_request import (
    CapturedSamplerSteps,
    RowRequest,
    draw_from_distributions,
    request_uniforms,
)


def make_request(**changes: object) -> RowRequest:
    settings = {"rows": np.array([1, 4], np.int32), "targets": np.array([7, 8], np.int32), "vocab_size": 9, "top_k": 2}
    return RowRequest(**{**settings, **changes})  # type: ignore[arg-type]


def test_a_request_survives_the_sampling_parameters() -> None:
    request = make_request(num_draws=3, seed="ff")
    found = RowRequest.from_sampling_params(SimpleNamespace(extra_args=request.extra_args()))
    assert found is not None
    for name, value in vars(request).items():
        np.testing.assert_array_equal(getattr(found, name), value)


def test_parameters_without_our_entry_hold_no_request() -> None:
    for extra_args in (None, {}, {"another": 1}):
        params = SimpleNamespace(extra_args=extra_args)
        assert RowRequest.from_sampling_params(params) is None
        assert CapturedSamplerSteps.from_sampling_params(params) is None
    assert RowRequest.from_sampling_params(None) is None


def test_uniforms_are_a_function_of_the_seed() -> None:
    uniforms = request_uniforms(make_request(num_draws=5, seed="a"))
    assert uniforms.shape == (2, 5)
    assert ((uniforms >= 0) & (uniforms < 1)).all()
    np.testing.assert_array_equal(uniforms, request_uniforms(make_request(num_draws=5, seed="a", top_k=1)))
    assert (uniforms != request_uniforms(make_request(num_draws=5, seed="b"))).all()


def test_entries_may_come_in_any_order_to_be_drawn_from() -> None:
    ids_RV = np.array([[2, 0, 1]], np.int32)
    logprobs_RV = np.log(np.array([[0.5, 0.25, 0.25]], np.float32))
    # The cumulative distribution by id is 0.25, 0.5, 1.
    uniforms_RD = np.array([[0.1, 0.3, 0.6, 0.99]])
    assert draw_from_distributions(ids_RV, logprobs_RV, uniforms_RD).tolist() == [[0, 1, 2, 2]]


def test_steps_of_the_sampler_become_rows() -> None:
    extra_args = CapturedSamplerSteps.extra_args()
    steps = CapturedSamplerSteps.from_sampling_params(SimpleNamespace(extra_args=extra_args))
    assert steps is not None
    # The own entry comes first, then the best ones; ranks and the rest of vLLM's record are ignored.
    steps.append(([[5, 5, 3]], [[-0.5, -0.5, -1.0]], [1], None))
    steps.append(([[7, 1, 2]], [[-3.0, -0.25, -2.0]], [9], None))
    rows = steps.rows()
    assert rows.own.tolist() == [-0.5, -3.0]
    assert rows.ids.tolist() == [[5, 3], [1, 2]]
    assert rows.logprobs.tolist() == [[-0.5, -1.0], [-0.25, -2.0]]
    assert rows.drawn.shape == (2, 0)


def test_steps_whose_ids_are_drawn_keep_no_entries_and_come_again() -> None:
    logprobs = np.log([0.5, 0.25, 0.25])
    found = []
    for _ in range(2):
        steps = CapturedSamplerSteps(num_draws=40, seed="5")
        for _ in range(3):
            steps.append(([[1, 2, 0, 1]], [[logprobs[1], *logprobs]]))
        found.append(steps.rows())
    assert found[0].ids.shape == found[0].logprobs.shape == (3, 0)
    assert found[0].drawn.shape == (3, 40)
    assert set(found[0].drawn.ravel().tolist()) == {0, 1, 2}
    np.testing.assert_array_equal(found[0].drawn, found[1].drawn)
    # Each step draws by random numbers of its own.
    assert (found[0].drawn[0] != found[0].drawn[1]).any()
