"""How residuals get to the host and back: what is kept, where layers begin, and what ties copies to them."""
