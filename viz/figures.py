"""Figures in files, drawn by matplotlib where it is installed: what plots.py and bench.py share."""
import contextlib
import os
from itertools import pairwise

from configurator import ConfigError

# a figure's text stays text in an SVG; Hangul in the name of a run needs one of these fonts, if it is there
LOOKS = {"svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}
HANGUL = "Noto Sans CJK KR", "NanumGothic", "Malgun Gothic", "Apple SD Gothic Neo"


@contextlib.contextmanager
def drawing(path, columns=1, size=(7, 4.5), top=1.0, rows=1, **shared):
    """Axes to draw on (`columns` or `rows` > 1: an array of them); at the end the figure is laid out and
    written.

    path: a file, or several that differ in their endings; size: inches, to which a legend of the figure's own
    adds its width on the right; top: share of the height that the axes may take, what is above is left to a
    legend; shared: more for pyplot.subplots, such as sharey.
    """
    plt = pyplot()
    with plt.rc_context(LOOKS | {"font.family": ["DejaVu Sans", *installed(HANGUL)]}):
        figure, axes = plt.subplots(rows, columns, figsize=size, **shared)
        try:
            yield axes
            figure.tight_layout(rect=(0, 0, beside_legend(figure), top))
            for file in [path] if isinstance(path, str | os.PathLike) else path:
                figure.savefig(file, dpi=120)
        except OSError as error:
            raise ConfigError(f"{error.filename or path} cannot be written ({error.strerror}): name another "
                              "folder") from error
        finally:
            plt.close(figure)


WAYS = (1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1)       # right and up of a point
STEPS = 5, 10, 18, 28, 40, 55                    # how far from it, in points
NEAR = 10                                        # a name further away has a line to its point


def name_points(axis, points, size=8):
    """Write names beside points, as near as they cover neither each other, nor points, lines, the legend, nor
    reach over the axes' edge, nor stand at another name's point; where there is no such place, over as little
    as can be. Limits and sizes must not change any more. points: (text, x, y) in data; size: of the letters.
    """
    axis.figure.tight_layout()                   # as `drawing` will
    scale = axis.figure.dpi / 72                 # pixels of a point
    legend = [axis.get_legend().get_window_extent()] if axis.get_legend() else []
    taken = [*map(extents, legend), *((x - 3, y - 3, x + 3, y + 3) for x, y in drawn_places(axis))]
    frame, dots = extents(axis.get_window_extent()), [axis.transData.transform(p[1:]) for p in points]
    for (text, x, y), here in zip(points, dots):
        others = [dot for dot in dots if dot is not here]
        wide, high = size_of(axis, text, size)

        def box_at(place, here=here, wide=wide, high=high):
            (across, up), step = place
            left = here[0] + across * step * scale - wide * (1 - across) / 2
            low = here[1] + up * step * scale - high * (1 - up) / 2
            return left, low, left + wide, low + high

        def cost(place, box_at=box_at, here=here, others=others):
            box = box_at(place)
            outside = box[0] < frame[0] or box[1] < frame[1] or box[2] > frame[2] or box[3] > frame[3]
            astray = place[1] <= NEAR and any(away(box, dot) < 2 * away(box, here) for dot in others)
            return sum(cover(box, other) for other in taken) + 1e6 * outside + 100 * astray
        (across, up), step = place = min(((way, step) for step in STEPS for way in WAYS), key=cost)
        line = dict(arrowstyle="-", lw=0.5, color="0.5", shrinkA=0, shrinkB=2) if step > NEAR else None
        axis.annotate(text, (x, y), (across * step, up * step), fontsize=size, textcoords="offset points",
                      ha=("center", "left", "right")[across], va=("center", "bottom", "top")[up],
                      arrowprops=line, parse_math=False)
        taken.append(box_at(place))


def size_of(axis, text, size):
    """Width and height of a text in pixels."""
    probe = axis.annotate(text, (0, 0), xycoords="figure pixels", fontsize=size, parse_math=False)
    box = probe.get_window_extent()
    probe.remove()
    return box.width, box.height


def drawn_places(axis):
    """Pixels along all lines of an axis and at their markers, every six of them."""
    for line in axis.get_lines():
        x, y = line.get_data(orig=False)
        if not line.get_transform().contains_branch(axis.transData) or not len(x):
            continue
        dots = axis.transData.transform(list(zip(x, y)))
        yield from dots
        for (a, b), (c, d) in pairwise(dots) if line.get_linestyle() != "None" else ():
            count = int(max(abs(c - a), abs(d - b)) / 6)
            yield from ((a + (c - a) * n / count, b + (d - b) * n / count) for n in range(1, count))


def extents(box):
    return box.x0, box.y0, box.x1, box.y1


def away(box, dot):
    """Pixels from a box to a dot (x, y)."""
    return max(box[0] - dot[0], dot[0] - box[2], 0) + max(box[1] - dot[1], dot[1] - box[3], 0)


def cover(one, other):
    """Pixels that two boxes (left, low, right, high) share."""
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return max(0, wide) * max(0, high)


def beside_legend(figure):
    """Make a figure as large as its own legend asks for -> the share of the width that is left to axes."""
    width, height = figure.get_size_inches()
    boxes = [legend.get_window_extent() for legend in figure.legends]
    wide = width + sum(box.width for box in boxes) / figure.dpi
    figure.set_size_inches(wide, max([height, *(box.height / figure.dpi for box in boxes)]))
    return width / wide


def pyplot():
    """matplotlib's, drawing into files."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ConfigError("figures need matplotlib: pip install matplotlib") from error
    return plt


def installed(fonts):
    """Those of the fonts that this machine has."""
    from matplotlib.font_manager import fontManager
    known = {font.name for font in fontManager.ttflist}
    return [font for font in fonts if font in known]
