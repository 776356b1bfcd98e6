(on request_headers (call $say @add@ (call $add_header_map_value #0 @X-UPPER@ @Value@)) #0)
