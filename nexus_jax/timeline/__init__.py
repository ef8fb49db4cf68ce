"""Memory over time: device bytes at every point of a compiled step, and what they are.

``nexus_jax.measure(...).timeline()`` makes a :class:`Timeline`; :func:`table`, :func:`draw` and :func:`write_html` show it.
"""

from nexus_jax.timeline.account import parse as parse
from nexus_jax.timeline.model import Buffer as Buffer
from nexus_jax.timeline.model import Group as Group
from nexus_jax.timeline.model import Point as Point
from nexus_jax.timeline.model import Sums as Sums
from nexus_jax.timeline.model import Timeline as Timeline
from nexus_jax.timeline.model import grouped as grouped
from nexus_jax.timeline.page import write_html as write_html
from nexus_jax.timeline.picture import draw as draw
from nexus_jax.timeline.show import table as table
