(on request_body
  (if (local.get $eos) (then (call $say @request@ (call $add_header_map_value #1 @x-sum@ @1@))))
  #0)
(on response_body
  (if (local.get $eos) (then (call $say @response@ (call $add_header_map_value #3 @x-sum@ @2@))))
  #0)
