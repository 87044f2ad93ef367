"""Knowledge bases: documents collected, cut, embedded, indexed, proven on questions, and answered from."""
