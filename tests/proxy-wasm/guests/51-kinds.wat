(on request_headers
  (call $say @downstream@ (call $continue_stream #2))
  (call $say @upstream@ (call $continue_stream #3))
  (call $say @none such@ (call $continue_stream #4))
  (call $say @close none such@ (call $close_stream #4))
  #0)
