"""How many bytes go where: rate-distortion curves and a budget to one choice per layer. Pure functions.

:class:`Exact` solves the integer programme and is what you want unless you cannot wait; :class:`Lagrangian` is its
fast approximation, within a stated bound. :func:`merge_groups` makes layers share a choice, :func:`allocate_within`
keeps a limit on time too.
"""

from tersor.allocators.exact import Exact
from tersor.allocators.group import expand_groups, merge_groups
from tersor.allocators.lagrangian import Lagrangian
from tersor.allocators.relaxation import lower_bound
from tersor.allocators.within import allocate_within

__all__ = ["Exact", "Lagrangian", "allocate_within", "expand_groups", "lower_bound", "merge_groups"]
