"""Pictures of landscapes and spectra: each as a PNG, and as a page to turn, zoom and point at.

Runs that are drawn together have panels of their own with equal scales. The pages read ``plotly.min.js``, which is put beside
them, and need no network. matplotlib and plotly load when something is drawn.
"""

from safe_lab.sharpness.plots.draw import (
    Spectrum,
    check_installed,
    draw_lines,
    draw_plane,
    draw_slices_1d,
    draw_slices_2d,
    draw_spectra,
)
from safe_lab.sharpness.plots.panels import format_number

__all__ = [
    "Spectrum",
    "check_installed",
    "draw_lines",
    "draw_plane",
    "draw_slices_1d",
    "draw_slices_2d",
    "draw_spectra",
    "format_number",
]
