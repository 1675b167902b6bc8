"""For type checkers, what `minires.ops` attaches to Tensor when it is imported: `engine` itself knows no op."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .ops.tensor import Methods
else:

    class Methods:
        """Nothing: Tensor's operators and methods are set on the class by `minires.ops.tensor`."""

        __slots__ = ()


__all__ = ["Methods"]
