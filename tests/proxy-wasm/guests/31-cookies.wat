(on response_headers (call $say @add@ (call $add_header_map_value #2 @set-cookie@ @c=3@)) #0)
