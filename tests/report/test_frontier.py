import xml.etree.ElementTree as ET

from hypothesis import given
from hypothesis import strategies as st

from farthing.report.charts import FRONTIER, Dot, best_for_the_money, frontier

money = st.floats(1e-6, 1e9)
share = st.floats(0, 1)


@given(st.lists(st.tuples(money, share), min_size=1, max_size=12))
def test_nothing_beats_what_is_best_and_something_beats_the_rest(points):
    best = best_for_the_money(points)
    assert any(best) == any(quality > 0 for _, quality in points)
    for point, is_best in zip(points, best, strict=True):
        beaten = [
            other for other in points if other[0] <= point[0] and other[1] >= point[1] and other != point
        ]
        assert (not beaten and point[1] > 0) == is_best
    cheapest = min(points, key=lambda point: (point[0], -point[1]))
    assert best[points.index(cheapest)] == (cheapest[1] > 0)


@st.composite
def dots(draw):
    low, middle, high = sorted(draw(st.tuples(share, share, share)))
    name = "".join(letter for letter in draw(st.text()) if letter.isprintable())
    return Dot(name, draw(money), middle, low, high, draw(st.booleans()))


@given(st.lists(dots(), min_size=1, max_size=8))
def test_a_drawing_of_any_runs_is_sound_and_inside_its_box(runs):
    circles = ET.fromstring(frontier(runs)).findall("circle")
    assert len(circles) == len(runs)
    for circle in circles:
        assert 0 <= float(circle.attrib["cx"]) <= FRONTIER.width
        assert 0 <= float(circle.attrib["cy"]) <= FRONTIER.height


def test_dearer_is_further_right_and_better_is_higher():
    dots = [Dot("a", 1.0, 0.2, 0.1, 0.3, True), Dot("b", 100.0, 0.6, 0.5, 0.7, True)]
    a, b = ET.fromstring(frontier(dots)).findall("circle")
    assert float(a.attrib["cx"]) < float(b.attrib["cx"])
    assert float(a.attrib["cy"]) > float(b.attrib["cy"])


def test_a_name_is_escaped():
    drawn = frontier([Dot('"><script>x</script>', 1.0, 0.5, 0.4, 0.6, True)])
    assert "<script>" not in drawn
    ET.fromstring(drawn)
