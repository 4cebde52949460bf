"""The drawings: what is where, and that nothing gets in unescaped."""

import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.report import charts

HOSTILE = '"><script>alert(1)</script>'
sane = st.floats(-1e90, 1e90).map(
    lambda value: value if abs(value) > 1e-90 else 0.0
)  # as read_run gives them


def drawn(svg: str) -> ET.Element:
    """The drawing as XML, so that an unescaped character or an unclosed element is an error."""
    return ET.fromstring(svg)


@given(sane, sane)
def test_ticks_cover_the_range_in_few_round_steps(one, other):
    low, high = min(one, other), max(one, other)
    if high - low < 1e-6 * max(abs(low), abs(high), 1e-90):
        return
    ticks = charts.ticks(low, high)
    step = ticks[1] - ticks[0]
    assert ticks[0] <= low + 1e-6 * step
    assert ticks[-1] >= high - 1e-6 * step
    assert 2 <= len(ticks) <= 8


@given(st.lists(st.floats(min_value=-1e6, max_value=1e6), min_size=1, max_size=200))
def test_smoothing_keeps_the_length_and_stays_within_the_values(values):
    means, window = charts.smooth(values)
    assert len(means) == len(values)
    assert window % 2 == 1
    assert min(means) >= min(values) - 1e-6
    assert max(means) <= max(values) + 1e-6


def test_smoothing_leaves_a_straight_line_alone_to_its_very_ends():
    line = [0.5 * step for step in range(100)]
    smoothed, window = charts.smooth(line)
    assert window > 1
    assert smoothed == pytest.approx(line)


def test_smoothing_damps_a_spike_even_at_the_end():
    smoothed, _ = charts.smooth([0.0] * 63 + [1.0])
    assert max(smoothed) < 0.7


@given(
    st.lists(st.tuples(st.integers(0, 10**6).map(float), sane), min_size=1, max_size=50),
    st.booleans(),
    st.one_of(st.none(), st.floats(min_value=1e-9, max_value=1.0)),
)
def test_a_curve_of_any_points_is_sound_and_inside_its_box(points, logarithmic, limit):
    points = [(x, abs(y) if logarithmic else y) for x, y in points]
    svg = drawn(
        charts.curve(
            [charts.Line(points)],
            "y",
            "said",
            logarithmic=logarithmic,
            limit=(limit, "most") if limit else None,
        )
    )
    line = svg.find("polyline")
    assert line is not None
    for place in line.attrib["points"].split():
        x, y = map(float, place.split(","))
        assert charts.CURVE.left - 0.1 <= x <= charts.CURVE.right + 0.1
        assert charts.CURVE.top - 0.1 <= y <= charts.CURVE.bottom + 0.1


def test_a_curve_rises_when_its_values_do_and_names_its_axes():
    svg = drawn(charts.curve([charts.Line([(1.0, 0.0), (2.0, 1.0)])], "share right", "said"))
    line = svg.find("polyline")
    assert line is not None
    (_, low), (_, high) = (map(float, place.split(",")) for place in line.attrib["points"].split())
    assert high < low
    said = ["".join(text.itertext()) for text in svg.iter("text")]
    assert "share right" in said
    assert "step" in said


def test_curves_and_the_frontier_each_have_their_own_box():
    dot = charts.Dot("a", 1.0, 0.5, 0.4, 0.6, True)
    assert drawn(charts.curve([charts.Line([(1.0, 2.0)])], "y", "said")).attrib["viewBox"] == "0 0 360 208"
    assert drawn(charts.frontier([dot])).attrib["viewBox"] == "0 0 680 400"


def test_a_long_curve_is_thinned_but_its_line_is_not():
    points = [(float(step), 1.0) for step in range(10_000)]
    svg = drawn(charts.curve([charts.Line(points)], "y", "said"))
    dots, line = svg.find("path"), svg.find("polyline")
    assert dots is not None
    assert line is not None
    assert dots.attrib["d"].count("M") <= charts.MOST_DOTS
    assert len(line.attrib["points"].split()) == 10_000


def test_exact_zeros_have_a_floor_of_their_own_on_a_logarithmic_axis():
    svg = drawn(charts.curve([charts.Line([(1.0, 0.0), (2.0, 1e-6)])], "y", "said", logarithmic=True))
    assert "0" in ["".join(text.itertext()) for text in svg.iter("text")]


def test_the_segments_of_a_bar_have_their_widths_and_only_fitting_labels():
    segments = [charts.Segment(0.6, "right", "right", "60%"), charts.Segment(0.03, "wrong", "wrong", "3%")]
    svg = drawn(charts.stacked(segments, "said"))
    assert [float(rect.attrib["width"].rstrip("%")) for rect in svg.iter("rect")] == pytest.approx([60, 3])
    assert [float(rect.attrib["x"].rstrip("%")) for rect in svg.iter("rect")] == pytest.approx([0, 60])
    assert [text.text for text in svg.iter("text")] == ["60%"]
    assert [title.text for title in svg.iter("title")] == ["right: 60%", "wrong: 3%"]


@given(st.lists(st.tuples(*[st.floats(0, 1)] * 3), min_size=1, max_size=4))
def test_intervals_hold_their_estimate_and_stay_on_the_page(found):
    rows = [charts.Estimate("before", *[sorted(one)[i] for i in (1, 0, 2)], css="before") for one in found]
    svg = drawn(charts.intervals(rows, "said"))
    whiskers = [line for line in svg.iter("line") if "whisker" in line.attrib["class"]]
    for whisker, dot in zip(whiskers, svg.iter("circle"), strict=True):
        low, high = (float(whisker.attrib[end].rstrip("%")) for end in ("x1", "x2"))
        assert 0 <= low <= float(dot.attrib["cx"].rstrip("%")) <= high <= 100


def test_every_label_is_escaped():
    everything = (
        charts.curve([charts.Line([(1.0, 2.0)])], HOSTILE, HOSTILE, lambda _: HOSTILE, limit=(1.0, HOSTILE)),
        charts.stacked([charts.Segment(1.0, "right", HOSTILE, HOSTILE)], HOSTILE),
        charts.intervals([charts.Estimate(HOSTILE, 0.5, 0.4, 0.6, "before")], HOSTILE),
    )
    for svg in everything:
        assert not re.search("<script", svg)
        drawn(svg)
