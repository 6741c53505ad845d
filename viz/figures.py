"""Figures in files, drawn by matplotlib where it is installed: what plots.py and bench.py share."""
import contextlib
import os

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
