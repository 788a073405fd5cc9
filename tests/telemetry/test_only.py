"""A gauge whose labels name one of many ranks."""

from dist_sae.telemetry.exporter import Telemetry

NAME = "dist_sae_train_slowest_ratio"


def test_a_gauge_forgets_the_labels_that_it_had_before() -> None:
    """Only the run's own labels are forgotten, because another run trains in the same process."""
    telemetry = Telemetry("a", "train", None)
    both = telemetry.of_runs("a"), telemetry.of_runs("b")
    for run in both:
        for slowest, ratio in (("3", 1.5), ("5", 1.25)):
            run.set_only(NAME, ratio, slowest=slowest, host="here")
    page = [line for line in telemetry.render().decode().splitlines() if line.startswith(NAME)]
    label = 'host="here",rank="0",role="train",run="{}",slowest="5"'
    assert sorted(page) == [f"{NAME}{{{label.format(run)}}} 1.25" for run in ("a", "b")]
