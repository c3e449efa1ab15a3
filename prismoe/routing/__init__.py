"""What the routers of a mixture do with text: counted, compared and drawn."""
