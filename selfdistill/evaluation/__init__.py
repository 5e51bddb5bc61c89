"""How good a solver is: scores, their intervals, and tables of them."""
