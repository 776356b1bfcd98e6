(on request_headers (call $say @set@ (call $set_header_map_pairs #0 #0 #0)) #0)
