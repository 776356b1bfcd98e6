;; HTTP/1 carries what the head announces.
(on request_headers (drop (call $add_header_map_value #0 @trailer@ @x-sum@)) #0)
(on response_headers (drop (call $add_header_map_value #2 @trailer@ @x-sum@)) #0)
(on request_body
  (if (local.get $eos) (then (call $say @request@ (call $add_header_map_value #1 @x-sum@ @1@))))
  #0)
(on response_body
  (if (local.get $eos) (then (call $say @response@ (call $add_header_map_value #3 @x-sum@ @2@))))
  #0)
