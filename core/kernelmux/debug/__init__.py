"""Who is to blame: two plans compared token by token and node by node, and the nodes at fault found by bisection."""
