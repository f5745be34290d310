"""How the model is spread over devices: mesh, sharding rules, expert exchange, ZeRO-1."""
