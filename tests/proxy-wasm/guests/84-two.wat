(on request_headers (call $say @request@ (call $add_header_map_value #0 @x-version@ @two@)) #0)
(on response_headers (call $say @response@ (call $add_header_map_value #2 @x-version@ @two@)) #0)
