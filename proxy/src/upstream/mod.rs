//! Endpoints as they run: what is known of each cluster beyond its configuration, and the connections to it.
